"""The SQL of the token path, compiled once from the tables, and its rows as records.

The ORM would cost more than everything else on that path together.  Compiling the same
`select()`s to text keeps the tables the only schema; a contract test holds raw record and ORM
record equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    BindParameter,
    ColumnElement,
    Dialect,
    LargeBinary,
    Select,
    String,
    bindparam,
    func,
    select,
)
from sqlmodel import col

from coatcheck.client_address import parse_networks
from coatcheck.scope import Scopes
from coatcheck.server.store.base import ApiKeyRecord, SigningKeyRecord
from coatcheck.server.store.tables import (
    ApiKey,
    ApiKeySecret,
    ChangeRow,
    Deployment,
    Group,
    Organization,
    Project,
    SigningKey,
)

#: How many secrets one request may present: its own, and its caller's (RFC 8693).
MOST_SECRETS: Final = 2
#: How many subjects a token may have.
MOST_SUBJECTS: Final = 8


@dataclass(frozen=True, slots=True)
class HotSql:
    """The statements as text, with parameters in the order in which the functions name them."""

    find_api_keys: str
    """Parameters: MOST_SECRETS digests.  Columns: as `record_from` reads them."""
    find_api_keys_at_head: str
    """The same; the head of the log stands before the other columns."""
    signing_keys: str
    """No parameters.  Columns: as `signing_key_from` reads them."""
    head: str
    """No parameters.  One row, one integer; NULL while nothing has happened."""
    narrowed_since: str
    """Parameters: MOST_SUBJECTS subjects, then `as_of`.  A row if any was narrowed since."""
    narrowings: str
    """Parameters: sequence number, seconds since the epoch.  Columns: as those of Narrowing."""
    log: str
    """No parameters.  One row, one text."""


def compiled_for(dialect: Dialect) -> HotSql:
    """The statements in the words of one database."""
    return HotSql(
        find_api_keys=_text(_find_api_keys(), dialect),
        find_api_keys_at_head=_text(_find_api_keys(_head().scalar_subquery()), dialect),
        signing_keys=_text(_signing_keys(), dialect),
        head=_text(_head(), dialect),
        narrowed_since=_text(_narrowed_since(), dialect),
        narrowings=_text(_narrowings(), dialect),
        log=_text(select(col(Deployment.log)), dialect),
    )


def digests_for(digests: Sequence[bytes]) -> tuple[bytes, ...]:
    """Digests as parameters of `find_api_keys`: repeated until there are MOST_SECRETS."""
    return tuple(digests) + (digests[0],) * (MOST_SECRETS - len(digests))


def subjects_for(subjects: Sequence[str], as_of: int) -> tuple[str | int, ...]:
    """Parameters of `narrowed_since`: subjects repeated until there are MOST_SUBJECTS.

    Raises:
        ValueError: there are more subjects than that.
    """
    if len(subjects) > MOST_SUBJECTS:
        raise ValueError(f"a token has at most {MOST_SUBJECTS} subjects")
    repeated = [subjects[0]] * (MOST_SUBJECTS - len(subjects))
    return (*subjects, *repeated, as_of)


def record_from(row: Sequence[Any]) -> ApiKeyRecord:
    """The record that one row of `find_api_keys` stands for."""
    return ApiKeyRecord(
        digest=bytes(row[0]),
        secret_expires_at=row[1],
        id=row[2],
        organization_id=row[3],
        environment=row[4],
        scopes=Scopes.parse(row[5]),
        audiences=tuple(row[6].split(" ")),
        expires_at=row[7],
        disabled_at=row[8],
        revoked_at=row[9],
        organization_suspended_at=row[10],
        disabled_reason=row[11],
        kind=row[12],
        project_id=row[13],
        project_archived_at=row[14],
        networks=None if row[15] is None else parse_networks(tuple(row[15].split(" "))),
        role=row[16],
        models=_words(row[17]),
        group_id=row[18],
        group_models=_words(row[19]),
        organization_spent_at=row[20],
    )


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(text.split(" "))


def signing_key_from(row: Sequence[Any]) -> SigningKeyRecord:
    """The record that one row of `signing_keys` stands for."""
    return SigningKeyRecord(
        kid=row[0],
        purpose=row[1],
        algorithm=row[2],
        public_jwk=row[3],
        sealed_private=bytes(row[4]),
        sealing_key_id=row[5],
        position=row[6],
        created_at=row[7],
        starts_at=row[8],
        withdrawn_at=row[9],
    )


def _head() -> Select[*tuple[Any, ...]]:
    return select(func.max(col(ChangeRow.seq)))


def _find_api_keys(*before: ColumnElement[Any]) -> Select[*tuple[Any, ...]]:
    return (
        select(
            *before,
            col(ApiKeySecret.digest),
            col(ApiKeySecret.expires_at),
            col(ApiKey.id),
            col(ApiKey.organization_id),
            col(ApiKey.environment),
            col(ApiKey.scopes),
            col(ApiKey.audiences),
            col(ApiKey.expires_at),
            col(ApiKey.disabled_at),
            col(ApiKey.revoked_at),
            col(Organization.suspended_at),
            col(ApiKey.disabled_reason),
            col(ApiKey.kind),
            col(ApiKey.project_id),
            col(Project.archived_at),
            col(ApiKey.networks),
            col(ApiKey.role),
            col(ApiKey.models),
            col(ApiKey.group_id),
            col(Group.models),
            col(Organization.credit_spent_at),
        )
        .join(ApiKey, col(ApiKey.id) == col(ApiKeySecret.api_key_id))
        .join(Organization, col(Organization.id) == col(ApiKey.organization_id))
        .outerjoin(Project, col(Project.id) == col(ApiKey.project_id))
        .outerjoin(Group, col(Group.id) == col(ApiKey.group_id))
        .where(col(ApiKeySecret.digest).in_(_slots("digest", MOST_SECRETS, LargeBinary())))
    )


def _signing_keys() -> Select[*tuple[Any, ...]]:
    return select(
        col(SigningKey.kid),
        col(SigningKey.purpose),
        col(SigningKey.algorithm),
        col(SigningKey.public_jwk),
        col(SigningKey.sealed_private),
        col(SigningKey.sealing_key_id),
        col(SigningKey.position),
        col(SigningKey.created_at),
        col(SigningKey.starts_at),
        col(SigningKey.withdrawn_at),
    ).order_by(col(SigningKey.position))


def _narrowed_since() -> Select[*tuple[Any, ...]]:
    return select(col(ChangeRow.seq)).where(
        col(ChangeRow.subject).in_(_slots("subject", MOST_SUBJECTS, String())),
        col(ChangeRow.seq) > bindparam("as_of", type_=BigInteger()),
        col(ChangeRow.narrows).is_(True),
    )


def _narrowings() -> Select[*tuple[Any, ...]]:
    return (
        select(
            col(ChangeRow.seq),
            col(ChangeRow.at),
            col(ChangeRow.what),
            col(ChangeRow.subject),
            col(ChangeRow.wider),
        )
        .where(
            col(ChangeRow.narrows).is_(True),
            col(ChangeRow.seq) > bindparam("after", type_=BigInteger()),
            col(ChangeRow.at) >= bindparam("since", type_=BigInteger()),
        )
        .order_by(col(ChangeRow.seq))
    )


def _slots(name: str, count: int, of_type: Any) -> list[BindParameter[Any]]:
    return [bindparam(f"{name}_{n}", type_=of_type) for n in range(count)]


def _text(statement: Select[*tuple[Any, ...]], dialect: Dialect) -> str:
    return str(statement.compile(dialect=dialect))
