"""How far something is."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Lock


@dataclass(frozen=True)
class Progress:
    """How far a conversion, an export or a verification is: arrays and bytes done, of how many."""

    arrays: int
    total_arrays: int
    nbytes: int
    total_nbytes: int


class Counter:
    """Turns "so much more is done", from several threads, into Progress, from one at a time."""

    def __init__(self, arrays: int, nbytes: int, on_progress: Callable[[Progress], None] | None) -> None:
        self._progress = Progress(0, arrays, 0, nbytes)
        self._tell, self._lock = on_progress, Lock()

    def add(self, nbytes: int, arrays: int = 0) -> None:
        """Count bytes that are done, and arrays that are whole now."""
        with self._lock:
            progress = self._progress
            self._progress = replace(progress, nbytes=progress.nbytes + nbytes, arrays=progress.arrays + arrays)
            if self._tell is not None:
                self._tell(self._progress)
