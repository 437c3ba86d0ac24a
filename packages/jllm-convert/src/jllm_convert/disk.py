"""The room that is left where something is to be written."""

import shutil
from pathlib import Path


def free_space(path: Path) -> tuple[Path, int]:
    """The folder at or above ``path`` that is there already, and the bytes that are free on its disk.

    Args:
        path: an absolute path, of a folder that may have to be made first.
    """
    place = next(folder for folder in (path, *path.parents) if folder.exists())
    return place, shutil.disk_usage(place).free
