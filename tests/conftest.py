"""Settings of all tests across packages."""

import jax

# What a test compiles is not kept: it would be found in the user's cache folder by the next run. Tests of the cache run
# processes of their own.
jax.config.update("jax_enable_compilation_cache", False)
