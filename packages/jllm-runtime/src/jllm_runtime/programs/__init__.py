"""Compiled programs: every ``jax.jit`` of the runtime."""
