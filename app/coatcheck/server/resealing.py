"""Replacing the sealing key: everything that lies sealed in the database is sealed anew.

Signing keys come first, all in one step: from then on new copies of secrets are sealed with the
successor, too.  The copies that were there follow in batches, so that nobody has to wait for long;
whatever was left by a run that ended early is done by the next one.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from coatcheck.server import signing
from coatcheck.server.changes import Actor, Change, What
from coatcheck.server.manage.api_keys import sealed_name
from coatcheck.server.sealing import BadSealingKey, SealingKey, SealingKeys
from coatcheck.server.store import Store

#: Copies that one transaction seals.
_BATCH: Final = 500


@dataclass(frozen=True, slots=True)
class Resealed:
    """What re-sealing came to.

    Attributes:
        kids: signing keys that were sealed anew; nothing, if it had been done before.
        left: withdrawn signing keys that no sealing key here opens; they are never used again.
        secrets: how many copies of secrets were sealed anew.
        copies_left_under: ids of the sealing keys of copies that did not open: they are not
            here, or the copies were altered.
        in_use: the sealing keys that are still needed, by id.
    """

    kids: Sequence[str]
    left: Sequence[str]
    secrets: int
    copies_left_under: Sequence[str]
    in_use: Collection[str]


def reseal(
    store: Store, sealing_keys: SealingKeys, successor: SealingKey, actor: Actor, *, now: int
) -> Resealed:
    """Seal every signing key and every copy of a secret with another sealing key.

    Args:
        now: seconds since the epoch.

    Raises:
        BadSealingKey: a signing key that was not withdrawn does not open; nothing was changed.
        StoreUnavailable: the database did not answer; what was sealed anew until then stays so.
    """
    done = signing.reseal(store, sealing_keys, successor, actor, now=now)
    secrets = sum(
        _reseal_copies(store, sealing_keys.by_id[sealing_key_id], successor, actor, now)
        for sealing_key_id in _of_copies(store)
        if sealing_key_id != successor.id and sealing_key_id in sealing_keys.by_id
    )
    # Looked at again: what has come since, and what did not open.
    needed = _of_copies(store)
    return Resealed(
        kids=done.kids,
        left=done.left,
        secrets=secrets,
        copies_left_under=[one for one in needed if one != successor.id],
        in_use={*done.in_use, *needed},
    )


def _of_copies(store: Store) -> list[str]:
    with store.transaction(read_only=True) as tx:
        return tx.sealing_keys_of_copies()


def _reseal_copies(
    store: Store, old: SealingKey, successor: SealingKey, actor: Actor, now: int
) -> int:
    """Seal the copies of one sealing key anew.  Returns how many."""
    count, after = 0, b""
    while True:
        with store.transaction() as tx:
            rows = tx.copies(old.id, after, _BATCH)
            if not rows:
                return count
            after = rows[-1].digest
            opened = 0
            for row in rows:
                name = sealed_name(row.api_key_id)
                try:
                    secret = old.unseal(row.sealed or b"", name)
                except BadSealingKey:
                    continue
                row.sealed = successor.seal(secret, name)
                row.sealing_key_id = successor.id
                opened += 1
            if opened:
                detail: dict[str, object] = {"secrets": opened}
                what = What.SIGNING_KEYS_RESEALED
                tx.append([Change(what, successor.id, actor, now, detail=detail)])
        count += opened
