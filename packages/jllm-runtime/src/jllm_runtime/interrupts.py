"""Ctrl-C: interrupts that Python would lose, delivered again."""

import _thread
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

AGAIN_S = 0.02
"""Seconds after which a lost interrupt comes again."""


@contextmanager
def keep_interrupts() -> Iterator[None]:
    """Raise every KeyboardInterrupt in the main thread's own code while the block runs.

    Python raises it wherever the main thread is. Inside a callback of the garbage collector (JAX has one that runs
    often), a ``__del__`` or a callback of a weak reference, it prints "Exception ignored in ..." and goes on as if
    nobody had pressed Ctrl-C. Here it comes again a moment later instead, and nothing is printed.
    """
    report_others = sys.unraisablehook

    def report(unraisable: "UnraisableHookArgs") -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # Later, not now: this function runs inside the same callback.
            again = Timer(AGAIN_S, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            report_others(unraisable)

    sys.unraisablehook = report
    try:
        yield
    finally:
        sys.unraisablehook = report_others
