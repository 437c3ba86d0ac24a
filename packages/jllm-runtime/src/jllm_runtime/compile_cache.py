"""The compile cache on disk: a program that was compiled once starts at once the next time."""

import os
from pathlib import Path

import jax
import platformdirs


def cache_folder() -> Path:
    """Where JLLM keeps what can be made again: ``JLLM_CACHE``, or the user's cache folder of the platform."""
    return Path(os.environ.get("JLLM_CACHE") or platformdirs.user_cache_dir("jllm", appauthor=False))


def use_compile_cache(folder: Path | None = None) -> None:
    """Keep compiled programs on disk, unless the program's own settings say where (or that) they are kept.

    JAX has one such cache a process; ``jax_compilation_cache_dir`` (or JAX_COMPILATION_CACHE_DIR) set before the call
    stays as it is.

    Args:
        folder: where; ``cache_folder() / "xla"`` when None.
    """
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    jax.config.update("jax_compilation_cache_dir", str(folder or cache_folder() / "xla"))
    # JAX leaves out what compiles in under a second; a start consists of many such programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
