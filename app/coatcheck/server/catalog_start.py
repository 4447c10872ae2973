"""The catalog at the start: whether it is the one that tokens out there were made under.

A catalog says what a scope-token means.  Under another one the tokens of before would say too
much or too little, so that they end with it, and are exchanged anew.
"""

import logging
from typing import Final

from coatcheck.server.catalog import Catalog
from coatcheck.server.changes import EVERYTHING, Actor, Change, What
from coatcheck.server.store import Store

_log = logging.getLogger(__name__)

#: Who says so, in the change log.
_START: Final = Actor("service:start")


def note(store: Store, catalog: Catalog, *, now: int) -> bool:
    """Remember the catalog that this process starts with.

    Every process of every node calls it; of several that start at once, one writes.

    Args:
        now: seconds since the epoch.

    Returns:
        Whether it ended the tokens of before, because it is another one than the last.

    Raises:
        StoreUnavailable: the database did not answer.
    """
    fingerprint = catalog.fingerprint()
    with store.transaction(read_only=True) as tx:
        deployment = tx.deployment()
        if deployment is None or deployment.catalog == fingerprint:
            return False
    with store.transaction() as tx:
        # Somebody else may have done so since.
        deployment = tx.deployment_for_change()
        before = deployment.catalog
        if before == fingerprint:
            return False
        deployment.catalog = fingerprint
        if before is None:
            return False
        detail: dict[str, object] = {"was": before, "is": fingerprint}
        tx.append([Change(What.CATALOG_CHANGED, EVERYTHING, _START, now, detail=detail)])
    _log.warning("the catalog is another one: every token that was made before is dead")
    return True
