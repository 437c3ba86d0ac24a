"""Versions of the layer math for particular platforms, each beside a plain one that serves as the reference."""
