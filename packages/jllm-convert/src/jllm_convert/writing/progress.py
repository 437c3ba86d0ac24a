"""Progress of long work: arrays and bytes done, reported to a callback."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Lock
from typing import Protocol


@dataclass(frozen=True)
class Progress:
    """Progress of a download, a conversion, an export or a verification.

    Attributes:
        arrays: arrays that are done.
        total_arrays: all arrays.
        nbytes: bytes that are done.
        total_nbytes: all bytes.
        step: the step that these are the numbers of, such as ``converting``: each step counts from 0.
    """

    arrays: int
    total_arrays: int
    nbytes: int
    total_nbytes: int
    step: str = ""


class Counter(Protocol):
    """What work is counted by, from several threads."""

    def add(self, nbytes: int, arrays: int = 0) -> None:
        """Count bytes that are done, and arrays that are complete now."""
        ...


class ProgressCounter:
    """Sum of the work of several threads, reported from one thread at a time.

    Args:
        arrays: all arrays.
        nbytes: all bytes.
        on_progress: called with the sum after each ``add``; None reports nothing.
        step: the name of the step.
    """

    def __init__(
        self, arrays: int, nbytes: int, on_progress: Callable[[Progress], None] | None, step: str = ""
    ) -> None:
        self._progress = Progress(0, arrays, 0, nbytes, step)
        self._report, self._lock = on_progress, Lock()

    def add(self, nbytes: int, arrays: int = 0) -> None:
        """Count bytes that are done, and arrays that are complete now."""
        # The callback runs under the lock too, so that it sees the sums in order.
        with self._lock:
            progress = self._progress
            self._progress = replace(progress, nbytes=progress.nbytes + nbytes, arrays=progress.arrays + arrays)
            if self._report is not None:
                self._report(self._progress)


def byte_progress(on_progress: Callable[[Progress], None] | None) -> Callable[[int, int], None] | None:
    """Adapt a callback that takes Progress to a download, which reports bytes done and all bytes."""
    if on_progress is None:
        return None
    return lambda done, total: on_progress(Progress(0, 1, done, total, "downloading"))
