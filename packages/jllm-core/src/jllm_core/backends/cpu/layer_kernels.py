"""Layer kernels: a transformer layer as one kernel (decoding), or as two around attention (prompts).

``Step`` is a whole layer for tokens that decode. Of prompts ``Project`` (``layer_inputs``) is what comes before the
keys and values are in the cache, and ``Close`` what comes after attention. All three are put together from the same
phases.

Activations are float32 ``[rows, width]``, one row a token. Every sum of a row goes along the row or along the slots
that it sees, in an order that depends on neither, the number of rows or of threads: see the modules of the parts.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jllm_core.backends.cpu.cache_writes import Part, Sizes, head_writer, write_tokens
from jllm_core.backends.cpu.decode_attention import multiply, write_decode_attention
from jllm_core.backends.cpu.kernel_building_blocks import (
    Gamma,
    Matrix,
    for_each_vector,
    rms_norm,
    store_operand_addresses,
    store_result_addresses,
    task_count,
)
from jllm_core.backends.cpu.layer_inputs import Matmuls, Project, store_layer_sizes
from jllm_core.backends.cpu.llvm_builder import F32, Code, Module, Value
from jllm_core.backends.cpu.threads import Buffer, Frame, Launch, WriteTask, write_kernel
from jllm_core.backends.cpu.vector_ops import exp, load


@dataclass(frozen=True)
class Close:
    """Kernel: the output matrix of attention and the feed-forward layer, each added to the residual stream.

    Operands as named, with ``x [rows, D]`` and ``attended [rows, N * H]``. Results ``y [rows, D]`` and the workspaces:
    ``added [rows, D]``, and for a feed-forward layer ``gates`` and ``ups [rows, F]``. The attribute ``eps`` is float32.

    Attributes:
        o: the output matrix.
        feed_forward: the matrices of gate, up and down; None ends with attention.
        norms: how gamma is stored.
    """

    o: Matrix
    feed_forward: tuple[Matrix, Matrix, Matrix] | None
    norms: Gamma

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        return ["x", "attended", *self.weights]

    @property
    def weights(self) -> list[str]:
        """The operands that are weights, in order."""
        feed_forward = (
            [] if self.feed_forward is None else ["post_gamma", *(n for m in self.feed_forward for n in m.operands)]
        )
        return [*self.o.operands, *feed_forward]

    @property
    def results(self) -> list[str]:
        """Names of the results, in order."""
        return ["y", "added", *(("gates", "ups") if self.feed_forward else ())]

    def write(self, module: Module) -> None:
        """Write the kernel's instructions."""

        def prepare(frame: Frame, launch: Launch) -> None:
            store_operand_addresses(frame, launch, self.operands)
            store_result_addresses(frame, launch, self.results)
            x, attended = frame.argument(0), frame.argument(1)
            for name, value in {"rows": x.dim(0), "width": x.dim(1), "q_width": attended.dim(1)}.items():
                launch.set(name, value)
            launch.set_float("eps", frame.attribute(0, F32))
            self.add_phases(launch, frame.result(len(self.results) - 1))

        write_kernel(module, prepare, self.phases(module))

    def add_phases(self, launch: Launch, last_result: Buffer) -> None:
        """Add the phases of ``phases``; the last result has the width of the feed-forward layer, if there is one."""
        launch.add_phase(task_count(launch, launch["width"]))
        if self.feed_forward:
            launch.set("ffw", last_result.dim(1))
            launch.add_phase(launch["rows"])
            launch.add_phase(task_count(launch, launch["ffw"]))
            launch.add_phase(task_count(launch, launch["width"]))

    def phases(self, module: Module) -> list[WriteTask]:
        """The output matrix; norm; gate and up with SiLU; down. The norm has a task a row, the others some outputs."""
        matmuls = Matmuls(module, self.o, *(self.feed_forward or ()))

        def multiply_and_add(
            code: Code, launch: Launch, task: Value, matrix: Matrix, x: str, width: str, residual: str
        ) -> None:
            """``y = residual + x w``, for the outputs of a task."""
            stride = 4 * launch["width"]
            # The residual is added to the finished sum, after scales and bias, as model.py does. So the matmul needs
            # a place of its own for its sums.
            first, count = matrix.multiply(
                launch,
                matmuls[matrix],
                x=(launch[x], 4 * launch[width]),
                y=(launch["added"], stride),
                inputs=launch[width],
                outs=launch["width"],
                task=task,
            )
            with code.loop(0, launch["rows"]) as row:
                start = row * stride + 4 * first

                def add(index: Value, lanes: int) -> None:
                    sum_ = load(code, launch[residual] + start + 4 * index, lanes) + load(
                        code, launch["added"] + start + 4 * index, lanes
                    )
                    code.store(launch["y"] + start + 4 * index, sum_)

                for_each_vector(code, count, add)

        def project(code: Code, launch: Launch, task: Value) -> None:
            multiply_and_add(code, launch, task, self.o, x="attended", width="q_width", residual="x")

        if self.feed_forward is None:
            return [project]
        return [project, *feed_forward_phases(self.feed_forward, self.norms, matmuls, multiply_and_add)]


@dataclass(frozen=True)
class Step:
    """Kernel: a layer for a few new tokens of each sequence: ``Project``, cache writes, decode attention, ``Close``.

    Operands as named, with ``x [rows, D]``, ``keys`` and ``values [R, K, S, H]``, ``positions [rows]``, and for each
    token the row and slot of the cache that it is written to, ``at_rows`` and ``at_slots [rows]``, all three int32.
    Results ``y [rows, D]``, keys and values again (and their scales), changed in place, and the workspaces of
    ``Project``, ``partials [rows, N, splits, H + LANES]``, ``attended [rows, N * H]`` and those of ``Close``.
    The attributes are ``eps``, float32, and ``window``, int64, 0 for none.

    Attributes:
        project: what comes before attention.
        cache: the type of keys and values; those of int8 have the operands ``key_scales`` and ``value_scales``.
        paged: whether keys and values are in pages, which the operand ``tables [B, n]`` names.
        close: what comes after attention.
    """

    project: Project
    cache: str
    paged: bool
    close: Close

    @property
    def slots(self) -> list[str]:
        """The operands that are the cache, in order; each is a result too."""
        return ["keys", "values", *(["key_scales", "value_scales"] if self.cache == "int8" else [])]

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        places = ["positions", "at_rows", "at_slots", *(["tables"] if self.paged else [])]
        return [*self.slots, *places, *self.project.operands, *self.close.weights]

    @property
    def results(self) -> list[str]:
        """Names of the results, in order."""
        return ["y", *self.slots, *self.project.results, "partials", "attended", *self.close.results[1:]]

    def write(self, module: Module) -> None:
        """Write the kernel's instructions."""
        attend, merge = write_decode_attention(module, self.cache, self.paged)
        write_head = head_writer(self.cache)

        def prepare(frame: Frame, launch: Launch) -> None:
            store_operand_addresses(frame, launch, self.operands)
            store_result_addresses(frame, launch, self.results)
            keys, x = frame.argument(0), frame.argument(self.operands.index("x"))
            q, k, partials = (frame.result(self.results.index(name)) for name in ("q_heads", "k_heads", "partials"))
            angles = frame.argument(self.operands.index("cos")) if self.project.rotates else None
            store_layer_sizes(launch, x, q, k, angles)
            # A batch has as many sequences as the cache has rows; in pages, as the tables have.
            sequences = frame.argument(self.operands.index("tables")).dim(0) if self.paged else keys.dim(0)
            ratios = {"group": launch["heads"] // launch["kv_heads"], "new_tokens": launch["rows"] // sequences}
            slots = {"slots": keys.dim(2), "pages": keys.dim(0)}
            sizes = {**ratios, **slots, "splits": partials.dim(2), "partial_bytes": 4 * partials.dim(3)}
            for name, value in {**sizes, "window": frame.attribute(1)}.items():
                launch.set(name, value)
            launch.set_float("eps", frame.attribute(0, F32))
            self.project.add_phases(launch)
            launch.add_phase(launch["rows"])
            launch.add_phase(launch["rows"] * launch["kv_heads"] * launch["splits"])
            launch.add_phase(launch["rows"])
            self.close.add_phases(launch, frame.result(len(self.results) - 1))

        def finish_heads_and_write(code: Code, launch: Launch, row: Value) -> None:
            # The task that finished a token's heads writes them to the cache; attention reads them after the barrier.
            self.project.finish_heads(code, launch, row)
            # The cache's rows are its pages where it has them.
            sizes = Sizes(launch["pages"], launch["kv_heads"], launch["slots"], launch["head"])
            key_scales, value_scales = [launch[name] for name in self.slots[2:]] or (None, None)
            parts = [
                Part(launch["k_heads"], launch["keys"], key_scales),
                Part(launch["v_heads"], launch["values"], value_scales),
            ]
            write_tokens(
                code,
                sizes,
                tokens=(row, row + 1),
                places=(launch["at_rows"], launch["at_slots"]),
                parts=parts,
                write_head=write_head,
            )

        def merge_and_gate(code: Code, launch: Launch, row: Value) -> None:
            merge(code, launch, row)
            if self.project.gated:
                offset = 4 * row * launch["q_width"]
                multiply(code, launch["attended"] + offset, launch["gate_heads"] + offset, launch["q_width"])

        before, after = self.project.phases(module), self.close.phases(module)
        write_kernel(module, prepare, [*before, finish_heads_and_write, attend, merge_and_gate, *after])


def feed_forward_phases(
    matrices: tuple[Matrix, Matrix, Matrix], norms: Gamma, matmuls: Matmuls, multiply_and_add: Callable[..., None]
) -> list[WriteTask]:
    """The phases of a feed-forward layer: norm; gate and up with SiLU; down.

    The workspace ``added`` held what attention added, which is in ``y`` by now. The norm is written there.
    """
    gate, up, down = matrices

    def norm(code: Code, launch: Launch, row: Value) -> None:
        offset = 4 * row * launch["width"]
        rms_norm(
            code,
            x=launch["y"] + offset,
            gamma=launch["post_gamma"],
            width=launch["width"],
            eps=launch.get_float("eps"),
            y=launch["added"] + offset,
            kind=norms,
        )

    def gate_and_up(code: Code, launch: Launch, task: Value) -> None:
        # The same outputs of gate and up in one task: SiLU then needs no barrier, and its inputs are in the cache.
        x, width, ffw = (launch["added"], 4 * launch["width"]), launch["width"], launch["ffw"]
        stride = 4 * ffw
        gates = (launch["gates"], stride)
        first, count = gate.multiply(launch, matmuls[gate], x=x, y=gates, inputs=width, outs=ffw, task=task)
        up.multiply(launch, matmuls[up], x=x, y=(launch["ups"], stride), inputs=width, outs=ffw, task=task)
        with code.loop(0, launch["rows"]) as row:
            start = row * stride + 4 * first

            def silu(index: Value, lanes: int) -> None:
                address = launch["gates"] + start + 4 * index
                gates, ups = load(code, address, lanes), load(code, launch["ups"] + start + 4 * index, lanes)
                # silu(g) = g / (1 + exp(-g)). exp overflows to infinity for g far below 0, and g by infinity is 0.
                code.store(address, gates / (exp(code, -1.0 * gates) + 1.0) * ups)

            for_each_vector(code, count, silu)

    def project_down(code: Code, launch: Launch, task: Value) -> None:
        multiply_and_add(code, launch, task, down, x="gates", width="ffw", residual="y")

    return [norm, gate_and_up, project_down]
