"""ASGI middleware, named for what it guards."""
