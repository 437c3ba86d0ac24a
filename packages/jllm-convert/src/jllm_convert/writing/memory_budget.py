"""Many tasks in several threads, with a window of memory that they hold together."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from threading import Condition, Event

from jllm_convert.errors import ConversionError

MIN_MEMORY = 64 << 20
DEFAULT_MEMORY = 256 << 20


def check_memory(memory: int) -> None:
    """Refuse a window that is too small to be of use.

    Raises:
        ConversionError: it is.
    """
    if memory < MIN_MEMORY:
        raise ConversionError(f"memory must be at least {MIN_MEMORY:,} bytes (64 MiB), got {memory:,}")


@dataclass(frozen=True)
class Task:
    """Something to do.

    Attributes:
        nbytes: how much memory it holds while it runs.
        run: does it. Called with a function that says whether to stop early, because another task has failed.
    """

    nbytes: int
    run: Callable[[Callable[[], bool]], None]


def run_tasks(tasks: Iterable[Task], memory: int) -> None:
    """Run tasks, as many at a time as processors can use and as their memory allows, the largest first.

    When one fails, or Ctrl-C comes, no other is begun, those that run end first, and the first exception is raised.

    Args:
        tasks: what to do.
        memory: bytes that all running tasks together may hold. A task that needs more runs on its own.
    """
    window, stop = _MemoryBudget(memory), Event()

    def run(task: Task) -> None:
        if not stop.is_set():
            with window.held(task.nbytes):
                if not stop.is_set():
                    task.run(stop.is_set)

    # Twice the processors: half of the threads wait for the disk.
    with ThreadPoolExecutor(2 * processors()) as pool:
        try:
            futures = [pool.submit(run, task) for task in sorted(tasks, key=lambda task: -task.nbytes)]
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            raise


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _MemoryBudget:
    def __init__(self, nbytes: int) -> None:
        self._all = self._free = nbytes
        self._changed = Condition()

    @contextlib.contextmanager
    def held(self, nbytes: int) -> Iterator[None]:
        nbytes = min(nbytes, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes
        try:
            yield
        finally:
            with self._changed:
                self._free += nbytes
                self._changed.notify_all()
