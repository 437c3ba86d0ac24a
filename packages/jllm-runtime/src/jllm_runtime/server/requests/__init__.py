"""Request handling: from the fields of a body to requests of the engine."""
