"""Coatcheck: exchange long-lived API keys for ten-minute signed tokens, and verify either.

Importing this package imports nothing else.  A resource server imports `coatcheck.verifier`.
"""
