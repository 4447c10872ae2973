"""Every operation of the management API.  A resource is one file here, and one line."""

from typing import Final

from coatcheck.server.manage.api import (
    devices,
    events,
    groups,
    keys,
    mcp,
    members,
    organizations,
    projects,
    self_service,
    usage,
)
from coatcheck.server.manage.api.call import Route

ROUTES: Final[tuple[Route, ...]] = (
    *self_service.ROUTES,
    *keys.ROUTES,
    *usage.ROUTES,
    *events.ROUTES,
    *organizations.ROUTES,
    *projects.ROUTES,
    *members.ROUTES,
    *groups.ROUTES,
    *devices.ROUTES,
    *mcp.ROUTES,
)
