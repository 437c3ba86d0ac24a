"""ASGI middleware, each named for what it guards."""
