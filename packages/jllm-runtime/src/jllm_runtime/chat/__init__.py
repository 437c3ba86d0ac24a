"""Conversations: with a model that is loaded here, or with one behind a server."""
