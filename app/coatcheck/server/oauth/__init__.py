"""OAuth's own words over `server.issue`: requests in, answers out.  The only room with Authlib.

Authlib's server core finds the grant or endpoint and calls it; everything it would decide by its
own defaults (client authentication, scopes, error texts, lifetimes) is decided here instead.
"""
