"""Compilation cache on disk, by JAX's persistent cache."""

import functools
import logging
import math
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import platformdirs

PROBE_BYTES = 2**20
"""Size of the file that tells whether a folder takes programs: about that of a program."""

FAILURE = re.compile(
    r"Error (?P<what>reading|writing) persistent compilation cache entry for '(?P<program>.*?)': (?P<why>.*)", re.DOTALL
)
"""JAX's warning of a program that it could not read or keep."""

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """JLLM's folder for files that can be made again: ``JLLM_CACHE``, or the platform's cache folder of the user."""
    return Path(os.environ.get("JLLM_CACHE") or platformdirs.user_cache_dir("jllm", appauthor=False))


def use_compile_cache(folder: Path | str | None = None) -> None:
    """Keep compiled programs on disk.

    JAX has one such cache for a process. A ``jax_compilation_cache_dir`` (or JAX_COMPILATION_CACHE_DIR) that is set
    before the call stays as it is, and where ``jax_enable_compilation_cache`` (or JAX_ENABLE_COMPILATION_CACHE) is
    false, nothing is kept.

    A folder that takes no files is no error: one sentence goes to the log, and programs are compiled at every start.
    Those that such a folder holds already are still used.

    Args:
        folder: the cache's folder; ``cache_folder() / "xla"`` when None.
    """
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        return
    folder = Path(folder or cache_folder() / "xla")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(PROBE_BYTES))
    except OSError as error:
        _say_once(_sentence(folder, error.strerror or str(error)))
        if not _holds_programs(folder):
            return
        least_s = math.inf
    else:
        # By default JAX leaves out what compiles in under a second, but a start has many such programs.
        least_s = 0.0
    _take_over_warnings(folder)
    settings.update("jax_compilation_cache_dir", str(folder))
    settings.update("jax_persistent_cache_min_compile_time_secs", least_s)


def keeps_programs() -> bool:
    """Whether what is compiled now is kept for the next start."""
    settings: Any = jax.config
    is_on = settings.jax_compilation_cache_dir and settings.jax_enable_compilation_cache
    return bool(is_on and settings.jax_persistent_cache_min_compile_time_secs < math.inf)


def _holds_programs(folder: Path) -> bool:
    try:
        return any(folder.glob("*-cache"))
    except OSError:
        return False


def _sentence(folder: Path, why: str) -> str:
    return (
        f"compiled programs cannot be kept in {folder} ({why}), so each start compiles them anew; "
        "set JLLM_CACHE to a folder that can be written"
    )


@functools.cache
def _say_once(sentence: str) -> None:
    logger.warning("%s", sentence)


def _take_over_warnings(folder: Path) -> None:
    """Have JAX's warnings of single programs end here: it has one for each that it cannot read or keep."""
    show_others = warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if (found := FAILURE.match(str(message))) is None:
            show_others(message, category, filename, lineno, file, line)
        elif found["what"] == "writing":
            _say_once(_sentence(folder, found["why"]))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
        else:
            # Cut short by a full disk, a crash or another process that has not done writing it. JAX would never write
            # it again, and compile it at every start.
            try:
                for entry in folder.glob(f"{found['program']}-*-cache"):
                    entry.unlink(missing_ok=True)
            except OSError:
                _say_once(_sentence(folder, found["why"]))

    # "always": where warnings are errors, one would come out of whatever was being compiled.
    warnings.filterwarnings("always", "Error (reading|writing) persistent compilation cache entry")
    warnings.showwarning = show
