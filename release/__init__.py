"""Release of the packages: what must hold before one is published (docs/internals/releasing.md)."""
