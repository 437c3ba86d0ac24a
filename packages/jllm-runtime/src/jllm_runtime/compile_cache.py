"""Compilation cache on disk, by JAX's persistent cache."""

import os
from pathlib import Path

import jax
import platformdirs


def cache_folder() -> Path:
    """JLLM's folder for files that can be made again: ``JLLM_CACHE``, or the platform's cache folder of the user."""
    return Path(os.environ.get("JLLM_CACHE") or platformdirs.user_cache_dir("jllm", appauthor=False))


def use_compile_cache(folder: Path | None = None) -> None:
    """Keep compiled programs on disk.

    JAX has one such cache for a process. A ``jax_compilation_cache_dir`` (or JAX_COMPILATION_CACHE_DIR) that is set
    before the call stays as it is.

    Args:
        folder: the cache's folder; ``cache_folder() / "xla"`` when None.
    """
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    jax.config.update("jax_compilation_cache_dir", str(folder or cache_folder() / "xla"))
    # By default JAX leaves out what compiles in under a second, but a start has many such programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
