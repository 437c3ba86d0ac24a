"""Chat sessions: with a model in this process, or with one behind a server."""
