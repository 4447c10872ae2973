"""The catalog: the product that a deployment issues keys for, as data.

Without a catalog file there is one brand, two environments, the default audience and the
management API's audience, both shared by the environments, and any well-formed scope.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from coatcheck.server.settings import Settings
from coatcheck.token_profile import Algorithm, TokenType

DEFAULT_BRAND: Final = "ck"
DEFAULT_ENVIRONMENTS: Final = ("live", "test")


@dataclass(frozen=True, slots=True)
class Audience:
    """A resource server, as tokens name it.

    Attributes:
        id: the `aud` of its tokens.
        environment: the one it belongs to; None: shared by all.
        algorithm: what signs its tokens.
        token_type: the `typ` of its tokens.
    """

    id: str
    environment: str | None
    algorithm: Algorithm
    token_type: TokenType


@dataclass(frozen=True, slots=True)
class Catalog:
    """What keys of this deployment look like and what they may be for."""

    brand: str
    environments: tuple[str, ...]
    audiences: Mapping[str, Audience]
    default_audiences: Mapping[str, str]
    """Environment → the audience of a request that names none."""

    @property
    def default_environment(self) -> str:
        return self.environments[0]


def without_file(settings: Settings) -> Catalog:
    """The catalog of a deployment that has none."""
    default = Audience(settings.default_audience, None, settings.algorithm, settings.token_type)
    management = Audience(settings.management_audience, None, "ES256", "at+jwt")
    return Catalog(
        brand=DEFAULT_BRAND,
        environments=DEFAULT_ENVIRONMENTS,
        audiences={audience.id: audience for audience in (management, default)},
        default_audiences=dict.fromkeys(DEFAULT_ENVIRONMENTS, default.id),
    )
