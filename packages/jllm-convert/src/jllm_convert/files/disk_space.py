"""Free disk space at a path, and the sizes of files that others may remove at any time."""

import contextlib
import shutil
from pathlib import Path


def free_space(path: Path) -> tuple[Path, int]:
    """Measure the free space where a folder is or will be made.

    Args:
        path: an absolute path. Its folders need not exist.

    Returns:
        The nearest folder at or above ``path`` that exists, and the free bytes on its disk.

    Raises:
        OSError: a folder of the path may not be read.
    """
    for place in (path, *path.parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # it may be removed at this moment
            if place.exists():
                return place, shutil.disk_usage(place).free
    raise FileNotFoundError(f"there is no folder above {path}")


def file_size(path: Path) -> int | None:
    """A file's size in bytes; None where there is none, or where another process removes it at this moment."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None
