"""How a kernel is entered, and how XLA's own threads share its work.

A kernel's work is a list of steps, each cut into pieces that can be done in any order; a step starts when the ones
before it are done. A piece's number is a ticket. Whoever is free draws the next ticket, waits until the steps before
are done, and does that piece. The thread that XLA calls draws tickets too, so the work is done even where no other
thread comes, and threads that come late find no ticket left. No thread is added to XLA's, and none waits outside a
kernel, so kernels may run at the same time.
"""

import os
from collections.abc import Callable
from typing import Any

from jllm_core.backends.cpu import call_frame as at
from jllm_core.backends.cpu.llvm_builder import BYTE, F32, I32, INT, NOTHING, Code, Module, Value, Variable

SYMBOL = "jllm_kernel"
MAX_STEPS = 14
PATIENCE = 500
"""How many moments a thread waits before it offers its processor to another."""

# A job, in memory of its own that the last thread to leave it frees. The counters are a line of memory apart.
NEXT, DONE, HOLDERS = 0, 64, 128
STEP_COUNT, FIRST_TICKETS = 184, 192
"""The first ticket of each step, and behind the last step the number of all."""
WIDEST = 176
SCHEDULE, THREADS, ERROR, THREAD_COUNT = 320, 368, 408, 440
PLAN = 448
"""Where the kernel keeps the numbers of its plan."""
JOB_SIZE = PLAN + 1024


class Plan:
    """The numbers that a kernel reads off the call frame once, before its pieces are done.

    The plan writes them in an order, and the pieces read them by the same names.
    """

    def __init__(self, code: Code, job: Value, names: list[str]) -> None:
        self.code, self.job, self.names = code, job, names

    def keep(self, name: str, value: Any) -> None:
        if name not in self.names:
            self.names.append(name)
        self.code.store(self.job + (PLAN + 8 * self.names.index(name)), value)

    def __getitem__(self, name: str) -> Value:
        return self.code.load(self.job + (PLAN + 8 * self.names.index(name)))

    def keep_float(self, name: str, value: Value) -> None:
        bits = self.code.builder.bitcast(value.ir, I32)
        self.keep(name, Value(self.code.builder, self.code.builder.zext(bits, INT)))

    def float(self, name: str) -> Value:
        return self.code.load(self.job + (PLAN + 8 * self.names.index(name)), F32)

    @property
    def threads(self) -> Value:
        return self.code.load(self.job + THREAD_COUNT)

    def add_step(self, pieces: Any) -> None:
        """Cut the next step into so many pieces."""
        code, job = self.code, self.job
        step = code.load(job + STEP_COUNT)
        first = job + FIRST_TICKETS + 8 * step
        count = pieces if isinstance(pieces, Value) else Value(code.builder, INT(pieces))
        code.store(first + 8, code.load(first) + count)
        code.store(job + STEP_COUNT, step + 1)
        code.store(job + WIDEST, code.most(code.load(job + WIDEST), count))


class Frame:
    """XLA's call frame."""

    def __init__(self, code: Code, address: Value) -> None:
        self.code, self.address = code, address

    def argument(self, number: int) -> "Buffer":
        return Buffer(self.code, self.code.load(self.code.load(self.address + at.FRAME_ARGS) + 8 * number))

    def result(self, number: int) -> "Buffer":
        return Buffer(self.code, self.code.load(self.code.load(self.address + at.FRAME_RETS) + 8 * number))

    def attribute(self, number: int, kind: Any = INT) -> Value:
        """A scalar; attributes are in the order of their names."""
        scalar = self.code.load(self.code.load(self.address + at.FRAME_ATTRS) + 8 * number)
        return self.code.load(self.code.load(scalar + at.SCALAR_VALUE), kind)


class Buffer:
    """An operand or a result."""

    def __init__(self, code: Code, address: Value) -> None:
        self.code, self.address = code, address

    @property
    def data(self) -> Value:
        return self.code.load(self.address + at.BUFFER_DATA)

    def dim(self, axis: int) -> Value:
        return self.code.load(self.code.load(self.address + at.BUFFER_DIMS) + 8 * axis)


WritePlan = Callable[[Frame, Plan], None]
WritePiece = Callable[[Code, Plan, Value], None]


def write_kernel(module: Module, write_plan: WritePlan, steps: list[WritePiece]) -> None:
    """Write the function that XLA calls, under the name ``SYMBOL``.

    Args:
        module: where to.
        write_plan: reads the buffers' addresses and sizes off the frame, and adds the steps.
        steps: for each step, what writes the work of a piece, given its number.
    """
    names: list[str] = []

    def make_plan(code: Code) -> None:
        job, frame = code.arguments
        write_plan(Frame(code, frame), Plan(code, job, names))
        code.finish()

    plan = module.function("plan", 2, make_plan)

    def write_step(write: WritePiece) -> Callable[[Code], None]:
        def piece(code: Code) -> None:
            job, number = code.arguments
            write(code, Plan(code, job, names), number)
            code.finish()

        return piece

    pieces = [module.function(f"step{n}", 2, write_step(write)) for n, write in enumerate(steps)]
    work = module.function("work", 1, lambda code: _work(code, pieces))
    leave = module.function("leave", 1, _leave)

    def help_out(code: Code) -> None:
        (job,) = code.arguments
        code.call(work, job)
        code.call(leave, job)
        code.finish()

    task = module.function("help_out", 1, help_out)
    module.function(SYMBOL, 1, lambda code: _enter(code, plan, task, work, leave), export=True)


def _work(code: Code, pieces: list[Any]) -> None:
    """Draw tickets until there are none."""
    (job,) = code.arguments
    total = code.load(job + FIRST_TICKETS + 8 * code.load(job + STEP_COUNT))
    step, ticket = Variable(code, 0), Variable(code, code.add_shared(job + NEXT, 1))
    with code.repeat_while(lambda: ticket.value < total):
        with code.repeat_while(lambda: code.load(job + FIRST_TICKETS + 8 + 8 * step.value) <= ticket.value):
            step.value += 1
        first = code.load(job + FIRST_TICKETS + 8 * step.value)
        _wait(code, job, first)
        for number, piece in enumerate(pieces):
            with code.when(step.value.equals(number)):
                code.call(piece, job, ticket.value - first)
        code.add_shared(job + DONE, 1)
        ticket.value = code.add_shared(job + NEXT, 1)
    code.finish()


def _wait(code: Code, job: Value, count: Value) -> None:
    """Until so many pieces are done: all of them are being worked on, so it is for no longer than one takes.

    Where the machine has more to do than processors, the worker may not be running; after a while it gets our turn.
    """
    turns = Variable(code, 0)
    with code.repeat_while(lambda: code.load_shared(job + DONE) < count):
        code.pause()
        turns.value += 1
        if os.name == "posix":
            with code.when((turns.value % PATIENCE).equals(0)):
                code.intrinsic("sched_yield", I32)


def _leave(code: Code) -> None:
    (job,) = code.arguments
    with code.when(code.add_shared(job + HOLDERS, -1).equals(1)):
        code.intrinsic("free", NOTHING, Value(code.builder, code.pointer(job, BYTE)))
    code.finish()


def _enter(code: Code, plan: Any, task: Any, work: Any, leave: Any) -> None:
    (frame,) = code.arguments
    _answer_metadata(code, frame)
    memory = code.intrinsic("malloc", BYTE.as_pointer(), INT(JOB_SIZE))
    job = Value(code.builder, code.builder.ptrtoint(memory.ir, INT))
    for field, start in ((NEXT, 0), (DONE, 0), (HOLDERS, 1), (STEP_COUNT, 0), (FIRST_TICKETS, 0), (WIDEST, 0)):
        code.store(job + field, start)
    _count_threads(code, frame, job)
    code.call(plan, job, frame)
    api = code.load(frame + at.FRAME_API)
    task_address = Value(code.builder, code.builder.ptrtoint(task, INT))
    fields = ((0, at.SCHEDULE_SIZE), (8, 0), (at.SCHEDULE_CONTEXT, code.load(frame + at.FRAME_CONTEXT)))
    for offset, value in (*fields, (at.SCHEDULE_TASK, task_address), (at.SCHEDULE_DATA, job)):
        code.store(job + SCHEDULE + offset, value)
    helpers = code.least(code.load(job + THREAD_COUNT), code.load(job + WIDEST)) - 1
    with code.loop(0, helpers):
        code.add_shared(job + HOLDERS, 1)
        error = code.call_address(code.load(api + at.API_SCHEDULE), job + SCHEDULE)
        with code.when(error > 0):
            _forget(code, api, error, job)
            code.add_shared(job + HOLDERS, -1)
    code.call(work, job)
    total = code.load(job + FIRST_TICKETS + 8 * code.load(job + STEP_COUNT))
    _wait(code, job, total)
    code.call(leave, job)
    code.finish()


def _count_threads(code: Code, frame: Value, job: Value) -> None:
    """Ask how many threads XLA computes with; 1 where it does not say."""
    api, answer = code.load(frame + at.FRAME_API), job + THREAD_COUNT
    code.store(answer, 1)
    fields = ((0, at.THREADS_SIZE), (8, 0), (at.THREADS_CONTEXT, code.load(frame + at.FRAME_CONTEXT)))
    for offset, value in (*fields, (at.THREADS_RESULT, answer)):
        code.store(job + THREADS + offset, value)
    error = code.call_address(code.load(api + at.API_THREADS), job + THREADS)
    with code.either(error.equals(0)) as (fine, failed):
        with fine:
            code.store(answer, code.most(code.load(answer), 1))
        with failed:
            _forget(code, api, error, job)
            code.store(answer, 1)


def _forget(code: Code, api: Value, error: Value, job: Value) -> None:
    for offset, value in ((0, at.DESTROY_SIZE), (8, 0), (at.DESTROY_ERROR, error)):
        code.store(job + ERROR + offset, value)
    code.call_address(code.load(api + at.API_ERROR_DESTROY), job + ERROR)


def _answer_metadata(code: Code, frame: Value) -> None:
    """When the kernel is registered, XLA asks for which version of its API it is. Where XLA's own structures are not
    those that the offsets are for, the answer is a version that it refuses."""
    extension = code.load(frame + at.FRAME_EXTENSION)
    # The second is read only where there is an extension.
    with code.when(extension > 0), code.when(code.load_int32(extension + at.EXTENSION_TYPE).equals(at.TYPE_METADATA)):
        metadata, api = code.load(extension + at.EXTENSION_METADATA), code.load(frame + at.FRAME_API)
        minor = code.load_int32(api + at.API_MINOR)
        fits = (
            (code.load(frame + at.FRAME_SIZE) >= at.FRAME_LEAST_SIZE)
            & (code.load(api + at.API_SIZE) >= at.API_LEAST_SIZE)
            & code.load_int32(api + at.API_MAJOR).equals(at.MAJOR)
            & (minor >= at.MINOR)
        )
        code.store_int32(metadata + at.METADATA_MAJOR, code.select(fits, Value(code.builder, INT(at.MAJOR)), -1))
        # A later minor version keeps what the offsets are for, and may not always take kernels of this one.
        code.store_int32(metadata + at.METADATA_MINOR, code.select(fits, minor, -1))
        code.store_int32(metadata + at.METADATA_TRAITS, 0)
        code.finish()
    with code.when(code.load_int32(frame + at.FRAME_STAGE).differs(at.STAGE_EXECUTE)):
        code.finish()
