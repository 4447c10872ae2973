"""The fixtures, as a user's own test suite has them: loaded by pytest, with nothing imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Without what belongs to this repository and to the run around it.
FOREIGN_TO_USERS = ("PYTEST_", "COATCHECK_", "COVERAGE_", "PYTHONPATH")

APP = """
from coatcheck.verifier import Verifier

verifier = Verifier("https://auth.acme.test", audience="https://api.acme.test")

def widgets(headers):
    return verifier.authenticate(headers, scopes="widgets:read").key_id
"""

TESTS = """
import threading
import pytest
import app
from coatcheck.verifier import VerifierError

session_token = []

def bearer(credential):
    return {"Authorization": f"Bearer {credential}"}

def test_a_token(coatcheck_token, coatcheck_issuer):
    assert app.widgets(bearer(coatcheck_token(scopes=["widgets:read"]))) == coatcheck_issuer.key_id

@pytest.fixture(scope="session")
def of_the_session(coatcheck_session_issuer):
    return coatcheck_session_issuer.token("widgets:read")

@pytest.mark.parametrize("turn", range(3))
def test_nothing_stays_revoked(turn, of_the_session, coatcheck_issuer):
    assert app.widgets(bearer(of_the_session))
    coatcheck_issuer.revoke(of_the_session)
    coatcheck_issuer.down()
    with pytest.raises(VerifierError, match="revoked"):
        app.widgets(bearer(of_the_session))

def test_no_thread_is_left():
    assert [t for t in threading.enumerate() if t.name.startswith("coatcheck")] == []

@pytest.mark.parametrize("code", ["missing_credentials", "token_expired", "insufficient_scope"])
def test_refusals(code, coatcheck_issuer):
    refused = coatcheck_issuer.credential_for(code, scopes="widgets:read")
    with pytest.raises(VerifierError) as error:
        app.widgets(refused.headers)
    assert error.value.code == code

def test_an_api_key_without_a_service_key(coatcheck_api_key):
    with pytest.raises(VerifierError) as error:
        app.widgets(bearer(coatcheck_api_key(scopes=["widgets:read"])))
    assert error.value.code == "tokens_only"
"""

OWN_ISSUER = """
import pytest
from coatcheck.testing import FakeIssuer

@pytest.fixture
def coatcheck_issuer():
    with FakeIssuer("https://auth.acme.test", audience="https://api.acme.test",
                    roles={"viewer": ["GET"]}) as issuer:
        yield issuer
"""


def run(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_TO_USERS)
    }
    # Named here, because nothing but it is wanted of what this environment has installed.
    plugin = ("-p", "coatcheck.testing.plugin")
    variables = {"PYTHONPATH": str(directory), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **variables}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", *plugin, *arguments],
        cwd=directory,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "test_app.py").write_text(TESTS)
    return tmp_path


def test_the_fixtures_take_issuer_and_audience_from_the_ini_file(suite: Path) -> None:
    """And each test finds nothing revoked and nobody away, with xdist here, below without."""
    (suite / "pytest.ini").write_text(
        "[pytest]\n"
        "coatcheck_issuer = https://auth.acme.test\n"
        "coatcheck_audience = https://api.acme.test\n"
    )
    done = run(suite, "-p", "xdist.plugin", "-n", "1")

    assert "9 passed" in done.stdout, done.stdout + done.stderr


def test_the_fixtures_take_them_from_the_environment_of_the_api(suite: Path) -> None:
    """The variables that the API itself reads."""
    done = run(
        suite,
        COATCHECK_ISSUER="https://auth.acme.test",
        COATCHECK_AUDIENCE="https://api.acme.test",
    )
    assert "9 passed" in done.stdout, done.stdout + done.stderr


def test_an_issuer_of_ones_own_takes_the_place_of_the_fixtures(tmp_path: Path) -> None:
    """The other fixtures go by it."""
    (tmp_path / "conftest.py").write_text(OWN_ISSUER)
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "test_app.py").write_text(
        "import app\n"
        "def test_a_role(coatcheck_token):\n"
        "    token = coatcheck_token('widgets:read', roles=['viewer'])\n"
        "    assert app.verifier.verify_jwt(token, method='GET')\n"
    )
    done = run(tmp_path)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_a_suite_that_does_not_use_it_pays_next_to_nothing() -> None:
    """It is loaded by every pytest where the package is installed: no framework, no crypto."""
    program = (
        "import sys, pytest\n"
        "before = set(sys.modules)\n"
        "import coatcheck.testing.plugin\n"
        "import json; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(json.loads(done.stdout)) - {"json", "json.decoder", "json.encoder", "json.scanner"}

    assert loaded == {"coatcheck", "coatcheck.testing", "coatcheck.testing.plugin"}


def test_the_package_needs_no_pytest() -> None:
    """Any test runner will do."""
    program = (
        "import sys\n"
        "from coatcheck.testing import REFUSALS, FakeIssuer\n"
        "assert 'pytest' not in sys.modules and '_pytest' not in sys.modules\n"
        "assert not hasattr(sys.modules['coatcheck.testing'], 'nothing')"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
