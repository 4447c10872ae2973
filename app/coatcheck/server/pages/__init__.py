"""Pages for people: the documentation at /docs, and what /oauth/authorize answers."""

from coatcheck.server.pages.docs import STYLE_HASH, authorize_page, openapi_text, render_docs

__all__ = ["STYLE_HASH", "authorize_page", "openapi_text", "render_docs"]
