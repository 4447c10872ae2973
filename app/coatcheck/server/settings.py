"""Settings: `COATCHECK_*` in the environment, each with a `_FILE` twin; validated at start.

A twin names a file that holds the value, as secret mounts do.  Nothing is read anywhere else:
whoever wants to know what a deployment runs on reads this page.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from coatcheck.durations import (
    JWKS_MAX_AGE,
    PUBLISH_AHEAD,
    ROTATE_EVERY,
    TOKEN_LIFETIME,
    Publication,
    span,
)
from coatcheck.token_profile import Algorithm, TokenType, is_audience

PREFIX: Final = "COATCHECK_"
Network = IPv4Network | IPv6Network


class BadSettings(ValueError):
    """A setting is wrong.  The message names it and says what to write instead."""


def _issuer(value: str) -> str:
    # RFC 8414 §2: a URL without query or fragment.  Compared byte for byte, so one spelling.
    url = urlsplit(value)
    if url.scheme not in ("http", "https") or not url.hostname or not is_audience(value):
        raise ValueError("an http(s) URL such as https://auth.example.com")
    if "?" in value or url.username is not None or value.endswith("/"):
        raise ValueError("no query, fragment, user or trailing slash, such as https://a.example")
    try:
        _ = url.port
    except ValueError:
        raise ValueError("the port is a number up to 65535") from None
    return value


def _audience(value: str | None) -> str | None:
    if value is not None and not is_audience(value):
        raise ValueError("printable ASCII without blanks, quotes, backslashes and fragments")
    return value


def _networks(value: object) -> object:
    if isinstance(value, str):
        try:
            return tuple(ip_network(part) for part in value.replace(",", " ").split())
        except ValueError:
            raise ValueError("networks such as 10.0.0.0/8, separated by commas") from None
    return value


def _seconds(value: object) -> object:
    if isinstance(value, str) and not (value.isascii() and value.isdecimal()):
        seconds = span(value)
        if seconds is None:
            raise ValueError("a span such as 30d or 12h, or seconds")
        return seconds
    return value


class Settings(BaseModel):
    """What one deployment runs on."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    issuer: Annotated[str, AfterValidator(_issuer)] = "http://127.0.0.1:8000"
    """This deployment's own URL: the token's `iss`, and where its endpoints are."""

    database_url: str = Field(default="sqlite:///coatcheck.db", repr=False)
    """`sqlite:///relative/path.db` or `sqlite:////absolute/path.db`."""

    keys_dir: Path = Path("keys")
    """The directory of the sealing key."""

    audience: Annotated[str | None, AfterValidator(_audience)] = None
    """The default audience; the issuer itself when not set."""

    catalog: Path | None = None
    """The catalog's file, such as coatcheck.toml; it takes the place of the next three settings and
    the one above."""

    algorithm: Algorithm = "ES256"
    """What signs tokens for the default audience."""

    token_type: TokenType = "at+jwt"  # noqa: S105 - a header value, no secret
    """`typ` of tokens for the default audience; `JWT` for verifiers that know no other."""

    trusted_proxies: Annotated[tuple[Network, ...], BeforeValidator(_networks)] = ()
    """Networks, separated by commas, whose X-Forwarded-For is believed."""

    guesses_per_minute: int = Field(default=60, ge=0)
    """How many wrong secrets one address may send a minute; 0 turns the limit off."""

    max_in_flight: int = Field(default=256, ge=1)
    """How many requests a worker may have under way; a token request beyond is told 503 at once."""

    metrics_from: Annotated[tuple[Network, ...], BeforeValidator(_networks)] = (
        ip_network("127.0.0.0/8"),
        ip_network("::1/128"),
    )
    """Networks, separated by commas, whose own connections may read `/metrics`."""

    log_format: Literal["json", "text"] | None = None
    """`json` or `text`; text on a terminal and JSON elsewhere when not set."""

    rotate_every: Annotated[int, BeforeValidator(_seconds), Field(ge=0)] = ROTATE_EVERY
    """A span such as 30d or 12h, or seconds: how long a signing key signs before the service lets
    the next one sign; 0: only when told."""

    allow_insecure_issuer: bool = False
    """Allow a plain-http issuer that is not on loopback: tokens then travel in the clear."""

    unsafe_token_lifetime: int | None = Field(default=None, ge=1, le=TOKEN_LIFETIME)
    """Seconds.  For tests on loopback: a shorter life of tokens."""

    unsafe_key_set_max_age: int | None = Field(default=None, ge=1, le=JWKS_MAX_AGE)
    """Seconds.  For tests on loopback: how long the key set may be cached.  Signing keys are
    published twice as long ahead, and two lifetimes of a token after."""

    unsafe_clock_offset: int = 0
    """Seconds.  For tests on loopback: how far this process's clock is moved."""

    @model_validator(mode="after")
    def _hold_together(self) -> Self:
        in_the_clear = urlsplit(self.issuer).scheme == "http" and not self.on_loopback
        if in_the_clear and not self.allow_insecure_issuer:
            raise ValueError(
                "COATCHECK_ISSUER is plain http and not on loopback: keys and tokens would travel"
                " in the clear.  Use https, or set COATCHECK_ALLOW_INSECURE_ISSUER=true"
            )
        unsafe = [name for name in self.model_fields_set if name.startswith("unsafe_")]
        if unsafe and not self.on_loopback:
            names = ", ".join(sorted(PREFIX + name.upper() for name in unsafe))
            raise ValueError(f"{names}: for tests on loopback only; remove it")
        shortest = 1 if self.unsafe_key_set_max_age else 2 * PUBLISH_AHEAD
        if 0 < self.rotate_every < shortest:
            raise ValueError(
                f"COATCHECK_ROTATE_EVERY: at least {shortest // 86400}d, because the next signing"
                f" key is published {PUBLISH_AHEAD // 3600} hours before it signs; or 0 for never"
            )
        return self

    @property
    def on_loopback(self) -> bool:
        """Whether the issuer can be reached from this machine only."""
        host = urlsplit(self.issuer).hostname or ""
        try:
            return ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")

    @property
    def default_audience(self) -> str:
        return self.audience or self.issuer

    @property
    def management_audience(self) -> str:
        """Whom tokens for the management API are for."""
        return f"{self.issuer}/v1"

    @property
    def token_lifetime_s(self) -> int:
        return self.unsafe_token_lifetime or TOKEN_LIFETIME

    @property
    def publication(self) -> Publication:
        """How long the key set is cached and signing keys are in it."""
        if self.unsafe_key_set_max_age is None:
            return Publication()
        return Publication.shrunk(self.unsafe_key_set_max_age, self.token_lifetime_s)

    @classmethod
    def load(cls, environ: Mapping[str, str]) -> Self:
        """Read the environment.  A variable that is empty counts as not set.

        Raises:
            BadSettings: every wrong setting by name, with what it should look like.
        """
        found = {name: _text(PREFIX + name.upper(), environ) for name in cls.model_fields}
        try:
            return cls(**{name: text for name, text in found.items() if text is not None})
        except ValidationError as error:
            raise BadSettings("\n".join(_sentences(error))) from None


def unknown_settings(environ: Mapping[str, str]) -> list[str]:
    """Names in the environment that look like ours and are not: misspelled, or of a caller.

    `COATCHECK_API_KEY` and others that only callers and verifiers read are known, too.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields} | _OF_OTHERS
    return sorted(
        name
        for name in environ
        if name.startswith(PREFIX) and name.removesuffix("_FILE") not in known
    )


@dataclass(frozen=True, slots=True)
class Effective:
    """A setting as it takes effect.

    Attributes:
        origin: `default`, `environment`, or `file` and the path of its `_FILE` twin.
        text: the value, secret or not; None if it is wrong.
        shown: the value as it may be shown to anybody.
    """

    variable: str
    origin: str
    text: str | None = dataclass_field(repr=False)
    shown: str

    def to_json(self) -> dict[str, object]:
        value = None if self.text is None else self.shown
        return {"setting": self.variable, "value": value, "origin": self.origin}


def effective(environ: Mapping[str, str]) -> tuple[dict[str, Effective], list[str]]:
    """Every setting by its name in `Settings`, and what is wrong, in sentences."""
    given: dict[str, Any] = {}
    problems: list[str] = []
    wrong: set[str] = set()
    for name in Settings.model_fields:
        try:
            given[name] = _text(PREFIX + name.upper(), environ)
        except BadSettings as error:
            problems.append(str(error))
            wrong.add(name)
    settings: Settings | None = None
    try:
        settings = Settings(**{name: text for name, text in given.items() if text is not None})
    except ValidationError as error:
        problems += _sentences(error)
        wrong |= {str(one["loc"][0]) for one in error.errors() if one["loc"]}
    found = {}
    for name, field in Settings.model_fields.items():
        variable = PREFIX + name.upper()
        value = getattr(settings, name) if settings else given.get(name)
        if value is None:
            value = field.get_default()
        if settings and name == "audience":
            value = settings.default_audience
        text = None if name in wrong else _plain(value)
        shown = "wrong" if text is None else text if field.repr else masked(text)
        found[name] = Effective(variable, _origin(variable, environ), text, shown)
    return found, problems


def masked(secret: str) -> str:
    """A secret as it may be shown: of a URL everything but its passwords, of others nothing."""
    scheme, separator, rest = secret.partition("://")
    userinfo, at, place = rest.rpartition("@")
    try:
        _ = urlsplit(f"{scheme}://{place}").port
    except ValueError:
        separator = ""
    if not separator:
        return _MASK
    user, colon, _ = userinfo.partition(":")
    shown = f"{scheme}://{user}{colon and f':{_MASK}'}{at}{place}"
    return _PASSWORD.sub(rf"\1{_MASK}", shown)


_MASK: Final = "****"
_PASSWORD: Final = re.compile(r"((?i:password)=)[^&]*")


def _plain(value: object) -> str:
    """A value as one would write it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def _origin(variable: str, environ: Mapping[str, str]) -> str:
    path = environ.get(f"{variable}_FILE")
    if path:
        return f"file {path}"
    return "environment" if environ.get(variable) else "default"


_OF_OTHERS: Final = {
    PREFIX + name
    for name in ("API_KEY", "ENVIRONMENT", "JWKS_URL", "SERVER", "SERVICE_KEY", "SCOPE", "RESOURCE")
}


def _text(variable: str, environ: Mapping[str, str]) -> Any:
    """What a variable or its twin says; None when neither is set."""
    text = environ.get(variable) or None
    path = environ.get(f"{variable}_FILE")
    if not path:
        return text
    if text is not None:
        raise BadSettings(f"{variable} and {variable}_FILE are both set: remove one")
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadSettings(f"{variable}_FILE: cannot be read ({type(error).__name__})") from None


def _sentences(error: ValidationError) -> list[str]:
    # The value itself is left out: it may be a password in a database URL.
    sentences = []
    for problem in error.errors(include_input=False, include_url=False):
        text = problem["msg"].removeprefix("Value error, ")
        name = f"{PREFIX}{'_'.join(map(str, problem['loc'])).upper()}: " if problem["loc"] else ""
        sentences.append(f"{name}{text}")
    return sentences
