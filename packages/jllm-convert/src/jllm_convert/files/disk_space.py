"""Free disk space at a path."""

import shutil
from pathlib import Path


def free_space(path: Path) -> tuple[Path, int]:
    """Measure the free space where a folder is or will be made.

    Args:
        path: an absolute path. Its folders need not exist.

    Returns:
        The nearest folder at or above ``path`` that exists, and the free bytes on its disk.
    """
    place = next(folder for folder in (path, *path.parents) if folder.exists())
    return place, shutil.disk_usage(place).free
