"""HTTP endpoints, one file a path."""
