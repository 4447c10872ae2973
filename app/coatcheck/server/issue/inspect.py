"""Whether a token of ours is good right now: signature and claims, then the change log.

Resource servers check tokens by themselves; this is for introspection and revocation, which are
asked about tokens of every audience and must know at once what was narrowed, and for what this
service guards itself.

Source: RFC 7662 §4 (what a server must check).
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from coatcheck.restrictions import Situation
from coatcheck.scope import RESOURCE_SERVER, Grant
from coatcheck.server import changes
from coatcheck.server.catalog import Audience
from coatcheck.server.signing import Ring, RingKeeper
from coatcheck.server.store import ApiKeyRecord
from coatcheck.token_profile import ALGORITHMS, TYPES
from coatcheck.verifier import check, keyset
from coatcheck.verifier.errors import VerifierError

#: What any audience takes; one that the catalog serves with plain JWTs takes those as well.
_EVERYWHERE: Final = frozenset(("at+jwt",))


@dataclass(frozen=True, slots=True)
class OwnToken:
    """A token that we signed and that has not expired."""

    signed: check.SignedClaims

    @property
    def kid(self) -> str:
        return self.signed.signing_key.kid

    @property
    def claims(self) -> Mapping[str, object]:
        return self.signed.claims

    @property
    def api_key_id(self) -> str:
        return str(self.claims["sub"])

    @property
    def jti(self) -> str:
        return str(self.claims["jti"])

    @property
    def as_of(self) -> int:
        as_of = self.claims["as_of"]
        assert isinstance(as_of, int)  # noqa: S101 - `token_profile.check` made sure
        return as_of

    @property
    def subjects(self) -> Sequence[str]:
        """Everything whose narrowing kills this token."""
        of_claims = (self.claims.get(name) for name in ("org_id", "project_id", "group"))
        wider = (str(subject) for subject in of_claims if subject is not None)
        return (self.api_key_id, *wider, self.kid, self.jti, changes.EVERYTHING)


class OwnTokens:
    """Recognizes tokens that this deployment signed, for whichever audience."""

    def __init__(self, issuer: str, audiences: Collection[str], ring: RingKeeper) -> None:
        self._ring = ring
        self._expected = check.Expected(
            issuer=issuer,
            audiences=tuple(audiences),
            types=frozenset(typ.lower() for typ in TYPES),
            algorithms=frozenset(ALGORITHMS),
            leeway_s=0,
        )
        self._signing_keys: tuple[Ring | None, Mapping[str, check.SigningKey]] = (None, {})

    def read(self, token: str, as_of: int, now: int) -> OwnToken | None:
        """The token, if its signature is ours and its time has not run out; else None.

        What restricts its use is for whoever it is used at to enforce, and not looked at.

        Args:
            as_of: the head of the change log; says which signing keys count.
            now: seconds since the epoch.

        Raises:
            StoreUnavailable: the ring could not be read.
        """
        try:
            signed = check.check_signed(token, self._expected, self.finder(as_of, now))
            unrestricted = signed._replace(must=())
            check.check_use(unrestricted, self._expected, now, Situation())
        except VerifierError:
            return None
        return OwnToken(signed)

    def used_at(self, audience: Audience, *, leeway_s: int = 0) -> "TokensAt":
        """Those that are used here, in place of a resource server.

        Args:
            leeway_s: how far the clocks of our nodes may be apart.
        """
        types = _EVERYWHERE | {audience.token_type.lower()}
        expected = replace(self._expected, audiences=(audience.id,), types=types, leeway_s=leeway_s)
        return TokensAt(expected, self.finder)

    def finder(self, as_of: int, now: int) -> check.FindSigningKey:
        """The signing keys that count.  Arguments and errors as those of `read`."""
        ring = self._ring.at(as_of)

        def find(kid: str) -> check.SigningKey | None:
            own = ring.get(kid)
            return self._published(ring).get(kid) if own and own.is_published(now) else None

        return find

    def _published(self, ring: Ring) -> Mapping[str, check.SigningKey]:
        """The public halves as any verifier would read them from the key set."""
        read_from, signing_keys = self._signing_keys
        if read_from is not ring:
            jwks = {"keys": [signing_key.public_jwk for signing_key in ring.signing_keys]}
            signing_keys = keyset.parse(json.dumps(jwks).encode())
            self._signing_keys = (ring, signing_keys)
        return signing_keys


class TokensAt:
    """Checks tokens as our verifier does at one audience.  Made by `OwnTokens.used_at`."""

    def __init__(
        self, expected: check.Expected, finder: Callable[[int, int], check.FindSigningKey]
    ) -> None:
        self._expected = expected
        self._finder = finder

    def verified(self, token: str, as_of: int, now: int, situation: Situation) -> OwnToken:
        """A token of ours that may be used for the request at hand.

        Raises:
            VerifierError: the first step of our verifier's check that fails.
            StoreUnavailable: the ring could not be read.
        """
        signed = check.check_signed(token, self._expected, self._finder(as_of, now))
        check.check_use(signed, self._expected, now, situation)
        return OwnToken(signed)

    def is_good_again(self, own: OwnToken, as_of: int, now: int, situation: Situation) -> bool:
        """Whether a token that was verified here before is still signed by a published key.

        Raises:
            As `verified`, if it may not be used for the request at hand.
        """
        signed = own.signed
        if self._finder(as_of, now)(signed.signing_key.kid) != signed.signing_key:
            return False
        check.check_use(signed, self._expected, now, situation)
        return True


def may_ask_about(caller: ApiKeyRecord, token: OwnToken) -> bool:
    """Whether this API key may learn of that token: its own, or one for its own audience.

    Source: RFC 7662 §4: a token's state is told to nobody whom the token is not for.
    """
    if caller.id == token.api_key_id:
        return True
    is_resource_server = caller.scopes.covers(Grant(RESOURCE_SERVER))
    return is_resource_server and token.claims["aud"] in caller.audiences
