"""The use case: a presented API key and an ask become a signed token, or a refusal.

This room knows nothing of HTTP, of SQL or of OAuth's words for errors.
"""
