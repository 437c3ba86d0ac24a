"""Memory budget: tasks in several threads that together hold no more than a number of bytes."""

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
    """Check a memory budget.

    Raises:
        ConversionError: it is less than ``MIN_MEMORY``.
    """
    if memory < MIN_MEMORY:
        raise ConversionError(f"memory must be at least {MIN_MEMORY:,} bytes (64 MiB), got {memory:,}")


@dataclass(frozen=True)
class Task:
    """Work that holds memory.

    Attributes:
        nbytes: the bytes of memory that it holds while it runs.
        run: the work. Takes a function that returns whether to stop early, because another task has failed.
        work: the bytes that it goes through, where those are more than it holds at a time.
    """

    nbytes: int
    run: Callable[[Callable[[], bool]], None]
    work: int = 0


def run_tasks(tasks: Iterable[Task], memory: int) -> None:
    """Run tasks in threads, as many at a time as the processors and the budget allow, the longest first.

    When one fails, or on Ctrl-C, no other starts, the running ones end, and the first exception is raised.

    Args:
        tasks: the work.
        memory: the bytes that all running tasks together may hold. A task that needs more runs alone.
    """
    budget, stop = _MemoryBudget(memory), Event()

    def run(task: Task) -> None:
        # Asked twice: the wait for memory may take long.
        if not stop.is_set():
            with budget.reserved(task.nbytes):
                if not stop.is_set():
                    task.run(stop.is_set)

    # Twice the processors: half of the threads wait for the disk.
    with ThreadPoolExecutor(2 * processors()) as pool:
        try:
            # The longest first: one that starts last would run alone at the end.
            longest_first = sorted(tasks, key=lambda task: -max(task.work, task.nbytes))
            futures = [pool.submit(run, task) for task in longest_first]
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            raise


def processors() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _MemoryBudget:
    """Bytes that threads reserve and give back; a thread waits while too few are free."""

    def __init__(self, nbytes: int) -> None:
        self._all = self._free = nbytes
        self._changed = Condition()

    @contextlib.contextmanager
    def reserved(self, nbytes: int) -> Iterator[None]:
        nbytes = min(nbytes, self._all)  # a task larger than the budget waits for all of it
        with self._changed:
            self._changed.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes
        try:
            yield
        finally:
            with self._changed:
                self._free += nbytes
                self._changed.notify_all()
