"""Whether a presented secret is good, and what it allows for an ask.  Pure; no clock of its own.

Source: RFC 6749 §2.3.1 (authentication), §3.3 (scope); RFC 8707 §2 (resource).
"""

import hmac

from coatcheck.restrictions import RESTRICTIONS, Allowance, Ask, Reason, Refusal, Role
from coatcheck.server.store import ApiKeyRecord, Found
from coatcheck.vocabulary import Vocabulary


class Widened(Exception):
    """A restriction gave more than it was given.  A fault of ours; nothing is issued."""


def recognize(found: Found, digest: bytes, client_id: str | None, now: int) -> ApiKeyRecord:
    """The record of a presented secret, if it may be used at all.

    1. The digest matches a record, compared in constant time.
    2. A presented client id is the record's own.
    3. The API key is not revoked, not disabled, not expired; its secret was not replaced, its
       project not archived.
    4. The organization is not suspended.

    Args:
        found: the answer to the look-up of the digest.
        digest: that of what somebody sent as an API key.
        client_id: what they sent as its id; None when nothing was.
        now: seconds since the epoch, taken before the look-up.

    Raises:
        Refusal: before step 3 always API_KEY_UNKNOWN, so that an answer tells nobody without
            the secret whether an API key exists.
    """
    # 1
    record = found.records.get(digest)
    if record is None or not hmac.compare_digest(record.digest, digest):
        raise Refusal(Reason.API_KEY_UNKNOWN)
    # 2
    if client_id is not None and client_id != record.id:
        raise Refusal(Reason.API_KEY_UNKNOWN)
    # 3: final states before those that can be undone, so that the text names the real obstacle.
    if record.revoked_at is not None:
        raise Refusal(Reason.API_KEY_REVOKED, at=record.revoked_at)
    if record.expires_at is not None and record.expires_at <= now:
        raise Refusal(Reason.API_KEY_EXPIRED, at=record.expires_at)
    if record.secret_expires_at is not None and record.secret_expires_at <= now:
        raise Refusal(Reason.API_KEY_REPLACED, at=record.secret_expires_at)
    if record.disabled_at is not None:
        is_spent = record.disabled_reason == "quota"
        reason = Reason.QUOTA_EXCEEDED if is_spent else Reason.API_KEY_DISABLED
        raise Refusal(reason, at=record.disabled_at)
    if record.project_archived_at is not None:
        raise Refusal(Reason.PROJECT_ARCHIVED, at=record.project_archived_at)
    # 4
    if record.organization_suspended_at is not None:
        raise Refusal(Reason.ORG_SUSPENDED, at=record.organization_suspended_at)
    return record


def decide(record: ApiKeyRecord, ask: Ask, role: Role | None = None) -> Allowance:
    """What tokens for this ask may be: everything the API key has, through every restriction.

    No time comes in: the outcome is the same at any moment for the same record.

    Args:
        role: what the catalog says of the record's role.

    Raises:
        Refusal: a restriction leaves nothing.
        Widened: a restriction is broken.
    """
    allowance = _everything(record, ask.vocabulary, role)
    for restriction in RESTRICTIONS:
        narrowed = restriction.narrow(allowance, ask)
        if narrowed is not allowance and not narrowed.lies_within(allowance):
            raise Widened(restriction.name)
        allowance = narrowed
    return allowance


def _everything(record: ApiKeyRecord, vocabulary: Vocabulary, role: Role | None) -> Allowance:
    """All that the API key has at an audience with this vocabulary."""
    ends = [end for end in (record.expires_at, record.secret_expires_at) if end is not None]
    if record.role is not None and (role is None or role.name != record.role):
        raise Widened("role")
    return Allowance(
        api_key_id=record.id,
        organization_id=record.organization_id,
        environment=record.environment,
        audiences=record.audiences,
        scopes=vocabulary.expand(record.scopes),
        expires_at=min(ends, default=None),
        networks=record.networks,
        project_id=record.project_id,
        role=role,
        models=_both(record.models, record.group_models),
        group_id=record.group_id,
    )


def _both(
    models: tuple[str, ...] | None, of_group: tuple[str, ...] | None
) -> tuple[str, ...] | None:
    """The models that both lists have; an absent list has all."""
    if models is None or of_group is None:
        return of_group if models is None else models
    return tuple(model for model in models if model in of_group)
