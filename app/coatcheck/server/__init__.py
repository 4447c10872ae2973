"""The service: everything a resource server does not install."""
