"""Putting a folder in the place of another, so that one of the two is always there."""

import ctypes
import os
import shutil
import sys
from pathlib import Path


def recover(dst: Path) -> None:
    """Give what was at ``dst`` its name back, if a kill came between the two renames of a replacement."""
    dst = dst.absolute()
    old = _old(dst)
    if os.path.lexists(old) and not os.path.lexists(dst):
        os.rename(old, dst)


def put_in_place(folder: Path, dst: Path) -> None:
    """Give ``folder`` the name ``dst``, and remove what had it."""
    if os.path.lexists(dst) and not _exchanged(folder, dst):
        old = _old(dst)
        os.rename(dst, old)
        try:
            os.rename(folder, dst)
        except OSError:
            os.rename(old, dst)
            raise
        remove(old)
    elif not os.path.lexists(dst):
        os.rename(folder, dst)
    if os.path.lexists(folder):
        remove(folder)


def _old(dst: Path) -> Path:
    """What the old folder is called for a moment, where two names cannot be exchanged."""
    return dst.with_name(f".{dst.name}.old")


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the system has exchanged the two names, in one step."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        at_working_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return bool(libc.renameat2(at_working_folder, names[0], at_working_folder, names[1], exchange) == 0)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(*names, 2) == 0)  # RENAME_SWAP
    return False


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
