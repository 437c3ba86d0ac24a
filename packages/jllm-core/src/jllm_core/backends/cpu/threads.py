"""Kernel entry point and work sharing on XLA's thread pool.

A kernel is a list of *phases*. A phase is cut into *tasks* that can run in any order; a barrier separates it from the
next phase. All tasks of a call are numbered through, and each thread takes the next number from an atomic counter,
waits until the phases before are done, and runs that task (dynamic scheduling). The thread that XLA calls takes tasks
too. So the work is done even where no other thread comes, and threads that come late find no task left. No thread is
added to XLA's pool, and none waits outside a kernel, so several kernels may run at the same time.
"""

import os
from collections.abc import Callable
from typing import Any

from jllm_core.backends.cpu import ffi_call_frame
from jllm_core.backends.cpu.llvm_builder import F32, I8, I32, I64, VOID, Code, Module, Value, Variable

SYMBOL = "jllm_kernel"
"""Name of the exported function that XLA calls."""
C_FUNCTIONS = ("malloc", "free", "sched_yield") if os.name == "posix" else ("malloc", "free", "__chkstk")
"""Functions of the process that compiled kernels call; on Windows LLVM adds the last one, where the stack grows."""
MAX_PHASES = 14
MAX_LAUNCH_VALUES = 128
SPINS_BEFORE_YIELD = 500
"""Times that a waiting thread checks the counter before it offers its processor to another thread."""

# Offsets, in bytes, into the record of a launch: memory that the entry function allocates and the last thread frees.
# The three atomic counters lie on cache lines of their own, so that a write to one does not slow readers of another.
OFFSET_NEXT_TASK, OFFSET_DONE_TASKS, OFFSET_HOLDERS = 0, 64, 128
OFFSET_WIDEST_PHASE = 176
"""The largest number of tasks of a phase: more threads than that are not asked for."""
OFFSET_PHASE_COUNT = 184
OFFSET_FIRST_TASKS = 192
"""The number of each phase's first task, and after the last phase the number of all tasks."""
# Argument structures of XLA's functions.
OFFSET_SCHEDULE_ARGS, OFFSET_THREADS_ARGS, OFFSET_ERROR_ARGS = 320, 368, 408
OFFSET_THREAD_COUNT = 440
OFFSET_VALUES = 448
"""The sizes and addresses that the kernel stores by name, 8 bytes each."""
RECORD_SIZE = OFFSET_VALUES + 8 * MAX_LAUNCH_VALUES


class Launch:
    """Sizes and addresses that the phases of a kernel share during one call.

    ``prepare`` reads them off the call frame once and stores them under names; the tasks load them by the same names.
    While the kernel is written, ``names`` maps a name to its place in the record.
    """

    def __init__(self, code: Code, record: Value, names: list[str]) -> None:
        self.code, self.record, self.names = code, record, names

    def _address(self, name: str) -> Value:
        return self.record + (OFFSET_VALUES + 8 * self.names.index(name))

    def set(self, name: str, value: Any) -> None:
        """Store an int64: a size or an address."""
        if name not in self.names:
            if len(self.names) == MAX_LAUNCH_VALUES:
                raise ValueError(f"a launch has room for {MAX_LAUNCH_VALUES} values, {name!r} is one too many")
            self.names.append(name)
        self.code.store(self._address(name), value)

    def __getitem__(self, name: str) -> Value:
        """Load the int64 of this name."""
        return self.code.load(self._address(name))

    def set_float(self, name: str, value: Value) -> None:
        """Store a float32."""
        bits = self.code.builder.bitcast(value.ir, I32)
        self.set(name, Value(self.code.builder, self.code.builder.zext(bits, I64)))

    def get_float(self, name: str) -> Value:
        """Load the float32 of this name."""
        return self.code.load(self._address(name), F32)

    @property
    def thread_count(self) -> Value:
        """Threads of XLA's pool."""
        return self.code.load(self.record + OFFSET_THREAD_COUNT)

    def add_phase(self, tasks: Any) -> None:
        """Add the next phase, of so many tasks. Phases are added in the order in which ``write_kernel`` gets them."""
        code, record = self.code, self.record
        phase = code.load(record + OFFSET_PHASE_COUNT)
        first = record + OFFSET_FIRST_TASKS + 8 * phase
        count = tasks if isinstance(tasks, Value) else Value(code.builder, I64(tasks))
        code.store(first + 8, code.load(first) + count)
        code.store(record + OFFSET_PHASE_COUNT, phase + 1)
        code.store(record + OFFSET_WIDEST_PHASE, code.maximum(code.load(record + OFFSET_WIDEST_PHASE), count))


class Frame:
    """XLA's call frame: operands, results and attributes of one call."""

    def __init__(self, code: Code, address: Value) -> None:
        self.code, self.address = code, address

    def argument(self, number: int) -> "Buffer":
        return Buffer(self.code, self.code.load(self.code.load(self.address + ffi_call_frame.FRAME_ARGS) + 8 * number))

    def result(self, number: int) -> "Buffer":
        return Buffer(self.code, self.code.load(self.code.load(self.address + ffi_call_frame.FRAME_RETS) + 8 * number))

    def attribute(self, number: int, kind: Any = I64) -> Value:
        """A scalar attribute. XLA sorts attributes by name, so ``number`` counts in that order."""
        scalar = self.code.load(self.code.load(self.address + ffi_call_frame.FRAME_ATTRS) + 8 * number)
        return self.code.load(self.code.load(scalar + ffi_call_frame.SCALAR_VALUE), kind)


class Buffer:
    """One operand or result in memory."""

    def __init__(self, code: Code, address: Value) -> None:
        self.code, self.address = code, address

    @property
    def data(self) -> Value:
        """The address of its first element."""
        return self.code.load(self.address + ffi_call_frame.BUFFER_DATA)

    def dim(self, axis: int) -> Value:
        """Its size along an axis."""
        return self.code.load(self.code.load(self.address + ffi_call_frame.BUFFER_DIMS) + 8 * axis)


WritePrepare = Callable[[Frame, Launch], None]
WriteTask = Callable[[Code, Launch, Value], None]
"""``write_task(code, launch, task)`` writes the work of one task, whose number within its phase is ``task``."""


def write_kernel(module: Module, prepare: WritePrepare, phases: list[WriteTask]) -> None:
    """Write the function that XLA calls, under the name ``SYMBOL``.

    Args:
        module: where to.
        prepare: stores addresses and sizes from the call frame in the launch, and adds the phases.
        phases: for each phase, what writes the work of a task.

    Raises:
        ValueError: more phases or names than the record has room for.
    """
    if len(phases) > MAX_PHASES:
        raise ValueError(f"a kernel has at most {MAX_PHASES} phases, got {len(phases)}")
    names: list[str] = []

    def write_prepare(code: Code) -> None:
        record, frame = code.arguments
        prepare(Frame(code, frame), Launch(code, record, names))
        code.ret()

    # Written first: it decides which name stands at which place of the record.
    prepare_function = module.function("prepare", 2, write_prepare)

    def write_phase(write_task: WriteTask) -> Callable[[Code], None]:
        def write(code: Code) -> None:
            record, task = code.arguments
            write_task(code, Launch(code, record, names), task)
            code.ret()

        return write

    phase_functions = [module.function(f"phase{n}", 2, write_phase(write)) for n, write in enumerate(phases)]
    run_tasks = module.function("run_tasks", 1, lambda code: _run_tasks(code, phase_functions))
    release = module.function("release", 1, _release)

    def write_help(code: Code) -> None:
        (record,) = code.arguments
        code.call(run_tasks, record)
        code.call(release, record)
        code.ret()

    help_out = module.function("help_out", 1, write_help)
    module.function(SYMBOL, 1, lambda code: _enter(code, prepare_function, help_out, run_tasks, release), export=True)


def _run_tasks(code: Code, phase_functions: list[Any]) -> None:
    """Take tasks from the shared counter until there are none."""
    (record,) = code.arguments
    total = code.load(record + OFFSET_FIRST_TASKS + 8 * code.load(record + OFFSET_PHASE_COUNT))
    phase, number = Variable(code, 0), Variable(code, code.atomic_add(record + OFFSET_NEXT_TASK, 1))
    with code.while_loop(lambda: number.value < total):
        # Numbers only grow, so the search for the phase goes on where it ended. Phases without tasks are passed over.
        with code.while_loop(lambda: code.load(record + OFFSET_FIRST_TASKS + 8 + 8 * phase.value) <= number.value):
            phase.value += 1
        first = code.load(record + OFFSET_FIRST_TASKS + 8 * phase.value)
        _wait(code, record, first)
        for n, function in enumerate(phase_functions):
            # Direct calls, not a table of addresses: LLVM can inline them.
            with code.if_then(phase.value.equals(n)):
                code.call(function, record, number.value - first)
        code.atomic_add(record + OFFSET_DONE_TASKS, 1)
        number.value = code.atomic_add(record + OFFSET_NEXT_TASK, 1)
    code.ret()


def _wait(code: Code, record: Value, count: Value) -> None:
    """Barrier: spin until so many tasks are done.

    Numbers are taken in order, so threads are already at work on all of these tasks, and the wait is no longer than
    one task takes. Where the machine has more threads than processors, such a thread may be suspended: after a while
    this one gives up its time slice.
    """
    spins = Variable(code, 0)
    with code.while_loop(lambda: code.atomic_load(record + OFFSET_DONE_TASKS) < count):
        code.pause()
        spins.value += 1
        if os.name == "posix":
            with code.if_then((spins.value % SPINS_BEFORE_YIELD).equals(0)):
                code.intrinsic("sched_yield", I32)


def _release(code: Code) -> None:
    """Give up this thread's hold on the record. The last thread frees it: a late one may come after the call ended."""
    (record,) = code.arguments
    with code.if_then(code.atomic_add(record + OFFSET_HOLDERS, -1).equals(1)):
        code.intrinsic("free", VOID, Value(code.builder, code.pointer(record, I8)))
    code.ret()


def _enter(code: Code, prepare: Any, help_out: Any, run_tasks: Any, release: Any) -> None:
    """The exported function: allocate the record, prepare, ask for threads, work, wait for the others' last tasks."""
    (frame,) = code.arguments
    _answer_metadata(code, frame)
    memory = code.intrinsic("malloc", I8.as_pointer(), I64(RECORD_SIZE))
    record = Value(code.builder, code.builder.ptrtoint(memory.ir, I64))
    counters = (OFFSET_NEXT_TASK, OFFSET_DONE_TASKS, OFFSET_HOLDERS)
    for offset in (*counters, OFFSET_PHASE_COUNT, OFFSET_FIRST_TASKS, OFFSET_WIDEST_PHASE):
        code.store(record + offset, int(offset == OFFSET_HOLDERS))  # this thread is the first holder
    _count_threads(code, frame, record)
    code.call(prepare, record, frame)
    # Every structure of XLA's begins with its own size, and a pointer to extensions, of which there are none.
    api = code.load(frame + ffi_call_frame.FRAME_API)
    help_address = Value(code.builder, code.builder.ptrtoint(help_out, I64))
    context = code.load(frame + ffi_call_frame.FRAME_CONTEXT)
    fields = ((0, ffi_call_frame.SCHEDULE_SIZE), (8, 0), (ffi_call_frame.SCHEDULE_CONTEXT, context))
    for offset, value in (
        *fields,
        (ffi_call_frame.SCHEDULE_TASK, help_address),
        (ffi_call_frame.SCHEDULE_DATA, record),
    ):
        code.store(record + OFFSET_SCHEDULE_ARGS + offset, value)
    helpers = code.minimum(code.load(record + OFFSET_THREAD_COUNT), code.load(record + OFFSET_WIDEST_PHASE)) - 1
    with code.loop(0, helpers):
        # Held before the helper can start, so that the record outlives it.
        code.atomic_add(record + OFFSET_HOLDERS, 1)
        error = code.call_address(code.load(api + ffi_call_frame.API_SCHEDULE), record + OFFSET_SCHEDULE_ARGS)
        with code.if_then(error > 0):  # a pointer; null is success
            _destroy_error(code, api, error, record)
            code.atomic_add(record + OFFSET_HOLDERS, -1)
    code.call(run_tasks, record)
    # There is no task left, but another thread may still be at its last one.
    total = code.load(record + OFFSET_FIRST_TASKS + 8 * code.load(record + OFFSET_PHASE_COUNT))
    _wait(code, record, total)
    code.call(release, record)
    code.ret()


def _count_threads(code: Code, frame: Value, record: Value) -> None:
    """Ask how many threads XLA's pool has; 1 where it does not say."""
    api, answer = code.load(frame + ffi_call_frame.FRAME_API), record + OFFSET_THREAD_COUNT
    code.store(answer, 1)
    context = code.load(frame + ffi_call_frame.FRAME_CONTEXT)
    fields = ((0, ffi_call_frame.THREADS_SIZE), (8, 0), (ffi_call_frame.THREADS_CONTEXT, context))
    for offset, value in (*fields, (ffi_call_frame.THREADS_RESULT, answer)):
        code.store(record + OFFSET_THREADS_ARGS + offset, value)
    error = code.call_address(code.load(api + ffi_call_frame.API_THREADS), record + OFFSET_THREADS_ARGS)
    with code.if_else(error.equals(0)) as (fine, failed):
        with fine:
            code.store(answer, code.maximum(code.load(answer), 1))
        with failed:
            _destroy_error(code, api, error, record)
            code.store(answer, 1)


def _destroy_error(code: Code, api: Value, error: Value, record: Value) -> None:
    """Free an error of XLA's: the work goes on without the thread that it did not give."""
    for offset, value in ((0, ffi_call_frame.DESTROY_SIZE), (8, 0), (ffi_call_frame.DESTROY_ERROR, error)):
        code.store(record + OFFSET_ERROR_ARGS + offset, value)
    code.call_address(code.load(api + ffi_call_frame.API_ERROR_DESTROY), record + OFFSET_ERROR_ARGS)


def _answer_metadata(code: Code, frame: Value) -> None:
    """Answer XLA's question at registration: for which version of its API is this kernel?

    Where XLA's own structures are not those of ``ffi_call_frame``, the answer is a version that it refuses.
    """
    extension = code.load(frame + ffi_call_frame.FRAME_EXTENSION)
    # Nested, because the extension's type may be read only where there is an extension.

    def asks_for_metadata() -> Value:
        return code.load_int32(extension + ffi_call_frame.EXTENSION_TYPE).equals(ffi_call_frame.TYPE_METADATA)

    with code.if_then(extension > 0), code.if_then(asks_for_metadata()):
        metadata = code.load(extension + ffi_call_frame.EXTENSION_METADATA)
        api = code.load(frame + ffi_call_frame.FRAME_API)
        minor = code.load_int32(api + ffi_call_frame.API_MINOR)
        fits = (
            (code.load(frame + ffi_call_frame.FRAME_SIZE) >= ffi_call_frame.MIN_FRAME_SIZE)
            & (code.load(api + ffi_call_frame.API_SIZE) >= ffi_call_frame.MIN_API_SIZE)
            & code.load_int32(api + ffi_call_frame.API_MAJOR).equals(ffi_call_frame.MAJOR)
            & (minor >= ffi_call_frame.MINOR)
        )
        major = Value(code.builder, I64(ffi_call_frame.MAJOR))
        code.store_int32(metadata + ffi_call_frame.METADATA_MAJOR, code.select(fits, major, -1))
        # A later minor version keeps what the offsets are for, and may not always take kernels of this one.
        code.store_int32(metadata + ffi_call_frame.METADATA_MINOR, code.select(fits, minor, -1))
        code.store_int32(metadata + ffi_call_frame.METADATA_TRAITS, 0)
        code.ret()
    # XLA also calls at stages of preparation, where there is nothing to do.
    with code.if_then(code.load_int32(frame + ffi_call_frame.FRAME_STAGE).not_equals(ffi_call_frame.STAGE_EXECUTE)):
        code.ret()
