"""Events: the change log, as those whom it concerns see it."""

import json

from coatcheck.server.manage import forms
from coatcheck.server.store.tables import ChangeRow


def told(row: ChangeRow) -> dict[str, object]:
    """One event, as the API tells it."""
    return {
        "id": str(row.seq),
        "at": forms.rfc3339(row.at),
        "what": row.what,
        "subject": row.subject,
        "actor": row.actor,
        "address": row.address,
        "requestId": row.request_id,
        "narrows": row.narrows,
        "detail": json.loads(row.detail),
    }
