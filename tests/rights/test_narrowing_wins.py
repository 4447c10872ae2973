"""What was narrowed stays narrow: tokens that were made before are dead, in every order.

answers.md K9 and K10; contract: "Revocation that reaches issued tokens".
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Final

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from coatcheck.server.changes import EVERYTHING, Change, What
from coatcheck.server.manage import api_keys, groups, organizations, projects
from rights.cast import PRODUCT, Made, Stage, a_product
from support.deployment import ISSUER, NOON, TESTER, form

#: Two dozen orders of eight changes, the same ones in every run.
CAREFULLY: Final = settings(
    max_examples=24,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with a_product(tmp_path_factory.mktemp("narrowing")) as made:
        yield made


class Story:
    """An API key that belongs to everything that can be narrowed, and what happens to that.

    Each change says whether tokens from before are dead afterwards.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage, self.store = stage, stage.deployment.store
        self.organization = stage.organization("Narrowed")
        self.project = stage.project(self.organization)
        self.group = stage.group(models=("large", "small"))
        self.key: Made = stage.api_key(
            self.organization,
            "read",
            "write",
            audiences=(PRODUCT,),
            project_id=self.project,
            group_id=self.group,
        )
        self.token = ""

    def issued(self) -> bool:
        """A new token, if there is one to be had."""
        answer = self.stage.http.post("/oauth/token", data=form(self.key.secret))
        if answer.status_code != 200:
            return False
        self.token = str(answer.json()["access_token"])
        return True

    def is_active(self) -> bool:
        """What its own API key is told of a token, or somebody who may ask if that one is dead."""
        answer = self.stage.http.post(
            "/oauth/introspect",
            headers={"Authorization": f"Bearer {self.observer}"},
            data={"token": self.token},
        )
        assert answer.status_code == 200, answer.text
        return bool(answer.json()["active"])

    observer: str

    # --- changes

    def disable(self) -> bool:
        was = api_keys.show(self.store, self.key.id, now=NOON).disabled_at
        api_keys.disable(self.store, self.key.id, TESTER, now=NOON)
        return was is None

    def enable(self) -> bool:
        api_keys.enable(self.store, self.key.id, TESTER, now=NOON)
        return False

    def suspend(self) -> bool:
        with self.store.transaction(read_only=True) as tx:
            row = tx.organization(self.organization)
            assert row is not None
            was = row.suspended_at
        organizations.suspend(self.store, self.organization, TESTER, now=NOON)
        return was is None

    def resume(self) -> bool:
        organizations.resume(self.store, self.organization, TESTER, now=NOON)
        return False

    def archive(self) -> bool:
        with self.store.transaction(read_only=True) as tx:
            row = tx.project(self.project)
            assert row is not None
            was = row.archived_at
        projects.archive(self.store, self.project, TESTER, now=NOON)
        return was is None

    def restore(self) -> bool:
        projects.restore(self.store, self.project, TESTER, now=NOON)
        return False

    def fewer_models(self) -> bool:
        return self._models(("small",))

    def more_models(self) -> bool:
        return self._models(("large", "small"))

    def _models(self, models: tuple[str, ...]) -> bool:
        before = groups.show(self.store, self.group).terms.models
        groups.edit(
            self.store,
            self.stage.deployment.catalog,
            self.group,
            lambda terms: replace(terms, models=models),
            TESTER,
            now=NOON,
        )
        return not set(before or ()) <= set(models)

    def fewer_scopes(self) -> bool:
        return self._scopes(("read",))

    def more_scopes(self) -> bool:
        return self._scopes(("read", "write"))

    def _scopes(self, scopes: tuple[str, ...]) -> bool:
        deployment = self.stage.deployment
        # What belongs to something archived is not edited.
        self.restore()
        return api_keys.edit(
            self.store,
            deployment.catalog,
            self.key.id,
            lambda before: replace(before, scopes=scopes),
            TESTER,
            now=NOON,
            issuer=ISSUER,
        ).narrows

    def rename(self) -> bool:
        deployment = self.stage.deployment
        self.restore()
        return api_keys.edit(
            self.store,
            deployment.catalog,
            self.key.id,
            lambda before: replace(before, name="renamed"),
            TESTER,
            now=NOON,
            issuer=ISSUER,
        ).narrows

    def rotate_without_overlap(self) -> bool:
        made = api_keys.rotate(self.store, self.key.id, TESTER, overlap_s=0, now=NOON)
        self.key = Made(self.key.id, made.key)
        return True

    def revoke_the_token(self) -> bool:
        answer = self.stage.http.post(
            "/oauth/revoke",
            headers={"Authorization": f"Bearer {self.key.secret}"},
            data={"token": self.token},
        )
        # Only an API key that is good ends its own tokens.
        return answer.status_code == 200

    def everything(self) -> bool:
        with self.store.transaction() as tx:
            tx.append([Change(What.CATALOG_CHANGED, EVERYTHING, TESTER, NOON)])
        return True


CHANGES: Final[tuple[Callable[[Story], bool], ...]] = (
    *(Story.disable, Story.enable, Story.suspend, Story.resume, Story.archive, Story.restore),
    *(Story.fewer_models, Story.more_models, Story.fewer_scopes, Story.more_scopes, Story.rename),
    *(Story.rotate_without_overlap, Story.revoke_the_token, Story.everything),
)


@CAREFULLY
@given(number=st.integers(0, 2**32))
def test_a_token_is_dead_from_the_first_narrowing_on(stage: Stage, number: int) -> None:
    """K10: the most restrictive wins, and nothing that comes later brings a token back."""
    chance = Random(number)  # noqa: S311 - nothing secret comes of it
    story = Story(stage)
    operators = stage.deployment.organization_id
    story.observer = stage.api_key(
        operators, "coatcheck:resource-server", "read", audiences=(PRODUCT,)
    ).secret
    assert story.issued()
    is_dead = False
    for _ in range(8):
        is_dead |= chance.choice(CHANGES)(story)

        assert story.is_active() is not is_dead
        if is_dead and chance.random() < 0.5 and story.issued():
            # What was made afterwards lives, whatever is in the log from before.
            is_dead = False
            assert story.is_active()


#: What stops new tokens, and what undoes it.
STOPS: Final = {
    "disabled": (Story.disable, Story.enable),
    "suspended": (Story.suspend, Story.resume),
    "archived": (Story.archive, Story.restore),
}


@pytest.mark.parametrize("first", STOPS)
@pytest.mark.parametrize("second", STOPS)
def test_two_stops_take_two_undoings(stage: Stage, first: str, second: str) -> None:
    """K9, K10: as long as one of them stands there is no new token, in whatever order they go."""
    story = Story(stage)
    stops = (STOPS[first], STOPS[second])
    for stop, _ in stops:
        stop(story)
        assert not story.issued()

    for number, (_, undo) in enumerate(stops, start=1):
        undo(story)
        assert story.issued() is (number == len(stops) or first == second)


def test_an_audience_that_is_gone_from_an_api_key_gets_no_new_token(stage: Stage) -> None:
    """K9, of an audience: what is no longer given is refused, and the tokens for it are dead."""
    story, deployment = Story(stage), stage.deployment
    story.observer = stage.api_key(
        deployment.organization_id, "coatcheck:resource-server", "read", audiences=(PRODUCT,)
    ).secret
    assert story.issued()

    api_keys.edit(
        deployment.store,
        deployment.catalog,
        story.key.id,
        lambda before: replace(before, audiences=("https://mcp.example.com/mcp",)),
        TESTER,
        now=NOON,
        issuer=ISSUER,
    )

    assert not story.is_active()
    assert not story.issued()
