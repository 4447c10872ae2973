"""`coatcheck.server.settings`: `COATCHECK_*`, the `_FILE` twins, and what refuses to start."""

from ipaddress import ip_network
from pathlib import Path

import pytest

from coatcheck.durations import Publication
from coatcheck.server.settings import BadSettings, Settings, unknown_settings

NAMES = tuple(Settings.model_fields)


def load(**environment: str) -> Settings:
    """The settings that an environment with just these of ours describes."""
    return Settings.load({f"COATCHECK_{name}": value for name, value in environment.items()})


def test_without_any_setting_it_is_a_service_on_loopback() -> None:
    """The defaults of the contract: the first start needs no configuration."""
    settings = load()

    assert settings.issuer == "http://127.0.0.1:8000"
    assert settings.database_url == "sqlite:///coatcheck.db"
    assert settings.keys_dir == Path("keys")
    assert settings.catalog is None
    assert settings.default_audience == settings.issuer
    assert settings.management_audience == "http://127.0.0.1:8000/v1"
    assert (settings.algorithm, settings.token_type) == ("ES256", "at+jwt")
    assert settings.trusted_proxies == ()
    assert settings.guesses_per_minute == 60
    assert settings.token_lifetime_s == 600
    assert settings.unsafe_clock_offset == 0


def test_the_default_audience_is_the_one_that_is_set() -> None:
    """`COATCHECK_AUDIENCE`: the default audience without a catalog."""
    settings = load(AUDIENCE="https://api.example.com")

    assert settings.default_audience == "https://api.example.com"


def test_an_empty_setting_counts_as_none() -> None:
    """Compose files write `COATCHECK_AUDIENCE=${AUDIENCE}`, set or not."""
    assert load(AUDIENCE="", ALGORITHM="", TRUSTED_PROXIES="").algorithm == "ES256"


@pytest.mark.parametrize("text", ["10.0.0.0/8,2001:db8::/32", "10.0.0.0/8, 2001:db8::/32"])
def test_trusted_proxies_are_separated_by_commas(text: str) -> None:
    """Addresses and networks, as people write lists in one line."""
    networks = load(TRUSTED_PROXIES=text).trusted_proxies

    assert networks == (ip_network("10.0.0.0/8"), ip_network("2001:db8::/32"))


def test_nothing_but_the_given_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument is all there is: no other variable, no `.env` file, decides in secret."""
    monkeypatch.setenv("COATCHECK_ISSUER", "https://process.example")

    assert load().issuer == "http://127.0.0.1:8000"
    assert load(ISSUER="https://given.example").issuer == "https://given.example"


# --- _FILE twins

GOOD = {
    "issuer": "https://auth.example.com",
    "database_url": "sqlite:////srv/coatcheck.db",
    "keys_dir": "/srv/keys",
    "audience": "https://api.example.com",
    "catalog": "/srv/coatcheck.toml",
    "algorithm": "RS256",
    "token_type": "JWT",
    "trusted_proxies": "10.0.0.0/8",
    "guesses_per_minute": "7",
    "max_in_flight": "7",
    "metrics_from": "10.0.0.0/8",
    "log_format": "text",
    "rotate_every": "30d",
    "allow_insecure_issuer": "true",
    "unsafe_token_lifetime": "5",
    "unsafe_key_set_max_age": "5",
    "unsafe_clock_offset": "-60",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_has_a_file_twin(tmp_path: Path, name: str) -> None:
    """Secret mounts are files; the line feed at their end is nobody's value."""
    file = tmp_path / "value"
    file.write_text(GOOD[name] + "\n", encoding="utf-8")

    from_file = getattr(load(**{f"{name.upper()}_FILE": str(file)}), name)

    assert from_file == getattr(load(**{name.upper(): GOOD[name]}), name)
    assert from_file != Settings.model_fields[name].default


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_and_its_twin_are_never_both_set(tmp_path: Path, name: str) -> None:
    """Whichever won, somebody would believe that the other one did."""
    file = tmp_path / "value"
    file.write_text(GOOD[name], encoding="utf-8")

    with pytest.raises(BadSettings, match=f"COATCHECK_{name.upper()}_FILE are both set"):
        load(**{name.upper(): GOOD[name], f"{name.upper()}_FILE": str(file)})


def test_a_twin_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A mount that failed must not turn into a default."""
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")

    for unreadable in (tmp_path / "absent", tmp_path, binary):
        with pytest.raises(BadSettings, match="COATCHECK_ISSUER_FILE: cannot be read"):
            load(ISSUER_FILE=str(unreadable))


# --- what refuses to start

BAD = {
    "issuer without a scheme": {"ISSUER": "auth.example.com"},
    "issuer of another scheme": {"ISSUER": "ftp://auth.example.com"},
    "issuer without a host": {"ISSUER": "https://"},
    "issuer with a slash at its end": {"ISSUER": "https://auth.example.com/"},
    "issuer with a query": {"ISSUER": "https://auth.example.com?a=1"},
    "issuer with an empty query": {"ISSUER": "https://auth.example.com?"},
    "issuer with a fragment": {"ISSUER": "https://auth.example.com#a"},
    "issuer with a user": {"ISSUER": "https://me@auth.example.com"},
    "issuer with a blank": {"ISSUER": "https://auth.example.com/a b"},
    "issuer with half an IPv6 address": {"ISSUER": "https://[::1"},
    "issuer with a port that is no number": {"ISSUER": "https://auth.example.com:http"},
    "issuer with a port that is none": {"ISSUER": "https://auth.example.com:70000"},
    "audience with a fragment": {"AUDIENCE": "https://api.example.com#a"},
    "audience with a blank": {"AUDIENCE": "two words"},
    "algorithm that shares a secret": {"ALGORITHM": "HS256"},
    "algorithm none": {"ALGORITHM": "none"},
    "token type of another kind": {"TOKEN_TYPE": "id+jwt"},
    "proxies that are none": {"TRUSTED_PROXIES": "nginx"},
    "proxies with bits set beyond the network": {"TRUSTED_PROXIES": "10.0.0.1/8"},
    "guesses below nothing": {"GUESSES_PER_MINUTE": "-1"},
    "guesses that are no number": {"GUESSES_PER_MINUTE": "many"},
    "rotations that are no span": {"ROTATE_EVERY": "monthly"},
    "rotations in a unit that is none": {"ROTATE_EVERY": "3w"},
    "rotations below nothing": {"ROTATE_EVERY": "-1"},
    "rotations faster than they are published ahead": {"ROTATE_EVERY": "47h"},
    "a cache of nothing": {"UNSAFE_KEY_SET_MAX_AGE": "0"},
    "a cache that is older": {"UNSAFE_KEY_SET_MAX_AGE": "301"},
    "a lifetime of nothing": {"UNSAFE_TOKEN_LIFETIME": "0"},
    "a lifetime that is longer": {"UNSAFE_TOKEN_LIFETIME": "601"},
}


@pytest.mark.parametrize("environment", BAD.values(), ids=BAD)
def test_a_wrong_setting_is_refused_by_name(environment: dict[str, str]) -> None:
    """It is told at the start, with the name of the variable to change."""
    (name,) = environment
    with pytest.raises(BadSettings, match=f"COATCHECK_{name}: "):
        load(**environment)


def test_all_wrong_settings_are_told_at_once() -> None:
    """Nobody should have to start the service five times."""
    with pytest.raises(BadSettings) as refused:
        load(ALGORITHM="none", GUESSES_PER_MINUTE="many", TOKEN_TYPE="x")

    for name in ("ALGORITHM", "GUESSES_PER_MINUTE", "TOKEN_TYPE"):
        assert f"COATCHECK_{name}: " in str(refused.value)


LOOPBACK = {
    "127.0.0.1": "http://127.0.0.1:8000",
    "another of 127/8": "http://127.9.9.9",
    "IPv6": "http://[::1]:8000",
    "localhost": "http://localhost:8000",
    "below localhost": "http://auth.localhost:8000/path",
}
ELSEWHERE = {
    "a name": "http://auth.example.com",
    "every address": "http://0.0.0.0:8000",
    "a private address": "http://192.168.1.1",
    "a name that begins like loopback": "http://127.0.0.1.example.com",
    "a name that begins with localhost": "http://localhost.example.com",
    "a name that ends in it": "http://notlocalhost",
}


@pytest.mark.parametrize("issuer", LOOPBACK.values(), ids=LOOPBACK)
def test_on_loopback_plain_http_is_fine(issuer: str) -> None:
    """Nobody else can read along there."""
    assert load(ISSUER=issuer).on_loopback


@pytest.mark.parametrize("issuer", ELSEWHERE.values(), ids=ELSEWHERE)
def test_off_loopback_plain_http_refuses_unless_told(issuer: str) -> None:
    """API keys and tokens would travel in the clear.  RFC 6749 §3.2."""
    with pytest.raises(BadSettings, match="COATCHECK_ALLOW_INSECURE_ISSUER=true"):
        load(ISSUER=issuer)

    assert not load(ISSUER=issuer, ALLOW_INSECURE_ISSUER="true").on_loopback


UNSAFE = [name.upper() for name in NAMES if "unsafe" in name]


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize(
    "issuer", ["https://auth.example.com", "http://auth.example.com"], ids=["https", "http"]
)
def test_off_loopback_an_unsafe_setting_refuses(name: str, issuer: str) -> None:
    """Shrunken durations and moved clocks are for tests; whoever allows http gets none, too."""
    with pytest.raises(BadSettings, match=f"COATCHECK_{name}: for tests on loopback only"):
        load(ISSUER=issuer, ALLOW_INSECURE_ISSUER="true", **{name: "1"})


def test_on_loopback_unsafe_settings_hold() -> None:
    """Journeys run with them."""
    settings = load(UNSAFE_TOKEN_LIFETIME="5", UNSAFE_CLOCK_OFFSET="-60")

    assert (settings.token_lifetime_s, settings.unsafe_clock_offset) == (5, -60)


# --- rotation

SPANS = {"90d": 90 * 86_400, "48h": 172_800, "172800": 172_800, "2880m": 172_800, "0": 0, "0d": 0}


@pytest.mark.parametrize(("text", "seconds"), SPANS.items(), ids=SPANS)
def test_how_often_signing_keys_rotate_is_a_span(text: str, seconds: int) -> None:
    """As people write it elsewhere; two days are the least, nothing means never."""
    assert load(ROTATE_EVERY=text).rotate_every == seconds


def test_without_a_word_signing_keys_rotate_every_quarter() -> None:
    """Who never thinks of it has fresh ones all the same."""
    assert load().rotate_every == 90 * 86_400
    assert load().publication == Publication(max_age=300, ahead=86_400, after=1200)


def test_a_shorter_cache_shortens_what_follows_from_it() -> None:
    """In the relations of `durations`: what journeys see in seconds is what happens in days."""
    settings = load(UNSAFE_KEY_SET_MAX_AGE="2", UNSAFE_TOKEN_LIFETIME="5", ROTATE_EVERY="4")

    told = settings.publication
    assert (told.max_age, told.ahead, told.after) == (2, 5, 10)
    assert told.look < told.ahead
    assert settings.rotate_every == 4


# --- secrets

SECRET = "hunter2-hunter2"


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("database_url", "keys_dir", "catalog")]
)
def test_no_message_repeats_a_value(name: str) -> None:
    """A secret may have been mounted into the wrong variable; the message ends in a log."""
    # The blank makes it wrong for settings that are free texts.
    with pytest.raises(BadSettings) as refused:
        load(**{name.upper(): f"{SECRET} {SECRET}"})

    assert SECRET not in str(refused.value)


def test_the_database_url_is_in_no_repr() -> None:
    """It may hold a password."""
    settings = load(DATABASE_URL=f"postgresql://coatcheck:{SECRET}@db/coatcheck")

    assert SECRET not in repr(settings)
    assert SECRET not in str(settings)


def test_the_database_url_is_in_no_message() -> None:
    """Another setting that is wrong must not lay it open."""
    with pytest.raises(BadSettings) as refused:
        load(DATABASE_URL=f"postgresql://u:{SECRET}@db/c", ISSUER="http://auth.example.com")

    assert SECRET not in str(refused.value)


def test_settings_do_not_change_under_way() -> None:
    """What was validated is what is used."""
    with pytest.raises(ValueError, match="frozen"):
        load().issuer = "https://evil.example"


# --- names


def test_names_that_are_nobodys_setting_are_listed() -> None:
    """`COATCHECK_AUDIENCES` would otherwise be ignored in silence."""
    environ = {
        "COATCHECK_AUDIENCES": "x",
        "COATCHECK_ISSUER": "x",
        "COATCHECK_ISSUER_FILE": "x",
        "COATCHECK_ISSUER_FILES": "x",
        "COATCHECK_API_KEY": "of a caller",
        "COATCHECK_API_KEY_FILE": "of a caller",
        "COATCHECK_SERVICE_KEY": "of a verifier",
        "PATH": "x",
    }

    assert unknown_settings(environ) == ["COATCHECK_AUDIENCES", "COATCHECK_ISSUER_FILES"]


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_known_by_its_own_name(name: str) -> None:
    """And by its twin's."""
    assert not unknown_settings({f"COATCHECK_{name.upper()}": ""})
    assert not unknown_settings({f"COATCHECK_{name.upper()}_FILE": ""})
