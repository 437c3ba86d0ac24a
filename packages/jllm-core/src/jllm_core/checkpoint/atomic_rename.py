"""Atomic replacement of a folder by another: a single rename where the system can exchange two names."""

import ctypes
import os
import shutil
import sys
from pathlib import Path


def recover(dst: Path) -> None:
    """Undo a replacement that was killed between its two renames: give the old folder its name ``dst`` back."""
    dst = dst.absolute()
    old = _backup_path(dst)
    if os.path.lexists(old) and not os.path.lexists(dst):
        os.rename(old, dst)


def replace_folder(folder: Path, dst: Path) -> None:
    """Rename ``folder`` to ``dst``, and remove what was there.

    Raises:
        OSError: renaming fails. What was at ``dst`` is there again.
    """
    if os.path.lexists(dst) and not _exchange(folder, dst):
        # Two renames. A kill between them leaves no ``dst``; ``recover`` then undoes the first.
        old = _backup_path(dst)
        os.rename(dst, old)
        try:
            os.rename(folder, dst)
        except OSError:
            os.rename(old, dst)
            raise
        remove(old)
    elif not os.path.lexists(dst):
        os.rename(folder, dst)
    if os.path.lexists(folder):  # after an exchange, the old folder has this name
        remove(folder)


def _backup_path(dst: Path) -> Path:
    """The name of the old folder between two renames, where two names cannot be exchanged."""
    return dst.with_name(f".{dst.name}.old")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step. Returns False where the system or the file system cannot."""
    # Python has no call for this: by way of the C library.
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        at_working_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return bool(libc.renameat2(at_working_folder, names[0], at_working_folder, names[1], exchange) == 0)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(*names, 2) == 0)  # RENAME_SWAP
    return False


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all its contents."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
