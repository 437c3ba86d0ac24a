"""Compilation of several programs side by side, before they are needed."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed

import jax

from jllm_runtime.errors import CompileError

TOO_LARGE = "RESOURCE_EXHAUSTED"
"""In the error of a compiler whose program does not fit on the device."""

Lower = Callable[[], jax.stages.Lowered]


def compile_together(
    programs: Mapping[str, Lower], done: Callable[[str, float], None] | None = None
) -> dict[str, jax.stages.Compiled]:
    """Lower and compile programs in threads of their own: both leave Python to the others.

    A later call of the same function with such arguments finds what is compiled here, and compiles nothing.

    Args:
        programs: what lowers each, by its name.
        done: told of each program, and of the seconds that it took, as soon as it is compiled.

    Returns:
        The compiled programs by name.

    Raises:
        CompileError: the first program that fails; ``too_large`` says that the device has no room for it.
    """

    def compiled(lower: Lower) -> tuple[jax.stages.Compiled, float]:
        start = time.perf_counter()
        program = lower().compile()
        return program, time.perf_counter() - start

    made: dict[str, jax.stages.Compiled] = {}
    with ThreadPoolExecutor(max(len(programs), 1)) as threads:
        names = {threads.submit(compiled, lower): name for name, lower in programs.items()}
        for future in as_completed(names):
            name = names[future]
            try:
                made[name], seconds = future.result()
            except jax.errors.JaxRuntimeError as error:
                raise CompileError(f"{name}: {error}", too_large=TOO_LARGE in str(error)) from error
            if done is not None:
                done(name, seconds)
    return made


def needed_bytes(program: jax.stages.Compiled) -> int:
    """Bytes that a program needs on each device beside its arguments; 0 where the compiler does not say."""
    memory = program.memory_analysis()
    if memory is None:
        return 0
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(outputs + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes)
