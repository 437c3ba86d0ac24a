"""Free disk space at a path, and the sizes of files that others may remove at any time."""

import contextlib
import os
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


def stored_under(folder: Path) -> int:
    """Measure the bytes that the files below a folder take on the disk: of one that is mostly empty, what is in it."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # removed at this moment
                status = os.stat(Path(place, name), follow_symlinks=False)
                total += min(status.st_size, getattr(status, "st_blocks", status.st_size) * 512)
    return total


def file_size(path: Path) -> int | None:
    """A file's size in bytes; None where there is none, or where another process removes it at this moment."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None
