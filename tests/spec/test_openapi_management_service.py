"""openapi.yaml against the management API in process: it answers what is documented, and no more.

First what Schemathesis works out of the document: its examples, and each rule kept and broken.
Then walks along the links: what one operation answers, another one takes.  Under `make fuzz` both
go on for longer, in tests/fuzz.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from spec.managed import CHECKS, Case, Managed, a_managed_deployment, strict, walk

schema = schemathesis.openapi.from_dict(strict())
worked_out = settings(
    max_examples=1,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def managed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Managed]:
    with a_managed_deployment(tmp_path_factory.mktemp("managed")) as running:
        yield running
        running.require_callers()


@schema.parametrize()
@worked_out
def test_answers_are_as_documented(case: Case, managed: Managed) -> None:
    """Whatever is sent, the answer is one that openapi.yaml lists, and never a 5xx."""
    case.validate_response(managed.send(case), checks=CHECKS)


def test_walks_along_the_links_are_as_documented(tmp_path: Path) -> None:
    """What one operation answers, another one takes: made, changed, ended, and asked for again."""
    walked = walk(schema, tmp_path, walks=20, steps=20)
    print(walked)
    # Links that lead nowhere would make this a test of single requests.
    assert sum(walked.values()) > 0
