"""Compilation of programs side by side, and before they are needed.

XLA compiles a program on one core for the most part, and lets go of Python's lock meanwhile. A program that was
compiled from the shapes, types and shardings of a later call is found by that call, without a second compilation.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from jax.stages import Compiled, Lowered

TOO_LARGE = "RESOURCE_EXHAUSTED"
"""In the error of a compiler whose program does not fit on the device."""

Lowerings = Mapping[str, Callable[[], Lowered]]
"""Functions that lower a program (``partial(program.lower, *arguments)``), by its name."""


def compile_together(lowerings: Lowerings, on_done: Callable[[str, float], None] | None = None) -> dict[str, Compiled]:
    """Compile programs side by side.

    Args:
        lowerings: the programs. They are lowered one after another on the caller's thread, whose settings of JAX count
            (and Python's lock would not let two do it at a time), and compiled on others meanwhile.
        on_done: called with the name of each compiled program and the seconds that it took, on any thread, one at a
            time.

    Returns:
        The compiled programs by name, in the same order.

    Raises:
        Exception: that of the first program that fails, in their order, with a note that names it. The others are
            compiled first.
    """
    one_at_a_time = threading.Lock()

    def compile_one(name: str, lowered: Lowered) -> Compiled:
        start = time.perf_counter()
        compiled = lowered.compile()
        if on_done is not None:
            with one_at_a_time:
                on_done(name, time.perf_counter() - start)
        return compiled

    compiled: dict[str, Compiled] = {}
    with ThreadPoolExecutor(min(len(lowerings), os.cpu_count() or 1) or 1, "jllm-compile") as pool:
        futures = {}
        for name, lower in lowerings.items():
            with _named(name):
                futures[name] = pool.submit(compile_one, name, lower())
    for name, future in futures.items():
        with _named(name):
            compiled[name] = future.result()
    return compiled


def needed_bytes(program: Compiled) -> int:
    """Bytes that a program needs on each device beside its arguments; 0 where the compiler does not say."""
    memory = program.memory_analysis()
    if memory is None:
        return 0
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(outputs + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes)


class BackgroundCompilation:
    """Compilation of programs one after another, on a thread of its own.

    A program that fails is left out: who calls it gets the error. The thread is waited for at the end of Python, for a
    compiler that is cut off takes the process down with an abort.
    """

    def __init__(self, lowerings: Lowerings) -> None:
        self._lowerings = lowerings
        self._thread = threading.Thread(target=self._run, name="jllm-compile-ahead")
        self._thread.start()

    def _run(self) -> None:
        for lower in self._lowerings.values():
            with contextlib.suppress(Exception):
                lower().compile()

    def wait(self) -> None:
        """Wait until all are compiled. A call of one before that would compile it a second time."""
        self._thread.join()


@contextlib.contextmanager
def _named(program: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"The program is {program}.")
        raise
