"""Advisory file locks (flock) of files and folders that others may remove or rename at any time."""

import os
from collections.abc import Callable
from pathlib import Path


def lock(path: Path, create: Callable[[], object], *, shared: bool = False, wait: bool = True) -> int:
    """Lock a file or a folder against other processes, and against other threads of this one.

    Args:
        path: the file or folder. Links are not followed.
        create: creates it where it is missing, and does nothing where it is there. Called again where it was removed
            before the lock was on it.
        shared: whether others may hold it at the same time, as long as they share it too.
        wait: whether to wait for the others, or to give up at once.

    Returns:
        A descriptor. The lock is held until it is closed, or the process ends, however that happens.

    Raises:
        BlockingIOError: without ``wait``, another one holds the lock.
        OSError: it cannot be created or opened, or the file system has no locks.
    """
    import fcntl  # not on Windows

    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        create()
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:  # removed since it was created
            continue
        try:
            fcntl.flock(descriptor, operation)
            # A lock is on a file, not on its name: another one may have taken the name meanwhile, or nothing.
            if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
