"""Response building: from the pieces of the engine to JSON objects and event streams."""
