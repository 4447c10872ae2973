"""The management API: who may do what, over the use cases of `manage`.

`ROUTES` is the whole list.  `answer` finds the route, loads the caller, checks its permission and
runs the handler, all in one transaction: rights are compared as they are at that moment, and what
is refused or fails leaves nothing behind.

The command line runs the same routes on the database itself, as a caller that may do everything.
It knows nothing of HTTP libraries: `server.inprocess` tells who calls, `server.app` translates.
"""
