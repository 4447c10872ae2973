"""Every operation of the management API.  A resource is one file here, and one line."""

from typing import Final

from coatcheck.server.manage.api import keys, self_service
from coatcheck.server.manage.api.call import Route

ROUTES: Final[tuple[Route, ...]] = (
    *self_service.ROUTES,
    *keys.ROUTES,
)
