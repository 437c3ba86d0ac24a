"""Backend protocol: the parts of the forward pass that a kind of device may compute in its own way."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from jllm_core.sharding import Placement

Part = Callable[..., Any]
"""A function that takes the arguments of the one whose place it takes, and gives what that would give."""


@dataclass(frozen=True)
class Backend:
    """Where a model runs, and what is computed there by other means than the maths as it is written.

    The maths stands once, in ``model.py`` and ``ops``. A backend names the parts of it that it computes itself; a part
    that is None is computed as written. It is chosen once, when a model is loaded (``backends.select``), and handed
    down as one value. It is hashable, so that ``jax.jit`` takes it as a static argument.

    Attributes:
        placement: the mesh that the weights live on, and the rules of what goes where; None leaves that to XLA.
        min_exact_batch: the fewest rows of a batch among which a row has the same bits as in any larger one that is a
            power of two. None: only batches of one size give the same bits.
        reads_filled_only: slots of a cache that no token is in yet may hold anything, even what is no number.
        name: what computes, for people, and why nothing faster; backends that differ in it alone are equal.
    """

    placement: Placement | None = None
    min_exact_batch: int | None = None
    reads_filled_only: bool = False
    name: str = field(default="XLA", compare=False)

    # Parts of model.py.
    embed: ClassVar[Part | None] = None
    layer: ClassVar[Part | None] = None
    final_norm: ClassVar[Part | None] = None
    unembed: ClassVar[Part | None] = None
    # Parts of ops.
    attention: ClassVar[Part | None] = None
    draw: ClassVar[Part | None] = None
    argmax: ClassVar[Part | None] = None
    # Parts of a cache: ``write_slots(slots, new, positions, rows)`` writes tokens at any rows and positions in place,
    # ``uninitialized(arrays)`` makes arrays like these that hold anything.
    write_slots: ClassVar[Part | None] = None
    uninitialized: ClassVar[Part | None] = None
    probes: ClassVar[Part | None] = None  # gives (read, multiply), which measure the device

    max_step_tokens: ClassVar[int | None] = None
    """New tokens of all rows together that one decode step takes at its full speed; None is any number."""
    prefill_tokens: ClassVar[int] = 256
    """Prompt tokens of all rows together with which a step runs at the speed of the device's arithmetic."""
    min_step_tokens: ClassVar[int] = 0
    """The same below which a step takes no less time, for the weights are read all the same."""
    ragged_queries: ClassVar[bool] = True
    """Whether the several queries of a row may stand at other positions than those of other rows, also where the cache
    says that slot s is for position s (over pages they always may)."""
    one_table_width: ClassVar[bool] = False
    """Whether attention reads only the pages that hold something: a wide table then costs no more than a narrow one."""

    @property
    def thresholds(self) -> Part | None:
        """``ops.sampling.thresholds``, on an accelerator or over a mesh."""
        from jllm_core.backends.threshold_candidates import for_placement

        return for_placement(self.placement)

    @property
    def moe(self) -> Part | None:
        """``ops.moe.moe``, where several devices share the experts, and the width of each, out."""
        if self.placement is None or self.placement.is_single:
            return None
        from jllm_core.backends.expert_parallel import moe_over_mesh

        return moe_over_mesh

    def experts(self, x: Any, sizes: Any, layer: Any) -> Any:
        """Each row through its own expert of ``layer``: the grouped products of ``ops.moe``. Of the rows ``x [M, D]``
        the first ``sizes[0]`` are the first expert's, and so on; what is left of them is zero in the result."""
        from jllm_core.backends.grouped_experts import mlp_by_blocks  # only mixtures have a use for it

        return mlp_by_blocks(x, sizes, layer)

    def attention_bytes(self, q: Any, k: Any, queries: int, held: tuple[int, ...], window: int | None) -> int:
        """The bytes that attention holds at a time on one device, for a plan.

        Args:
            q, k: descriptions of the queries ``[B, T, N, H]`` and of the cache's keys ``[B, K, S, H]``, on all devices
                together.
            queries: rows, tokens and heads of one device, multiplied.
            held: the shape of the keys on one device.
            window: how many positions a query sees, or None.
        """
        size = int(np.dtype(q.dtype).itemsize)
        scores = queries * held[2] * (4 + size)  # in float32, and the probabilities
        # What is not of the queries' type becomes so before it is multiplied, keys and values.
        return scores + (0 if q.dtype == k.dtype else 2 * math.prod(held) * size)


class XLA(Backend):
    """The maths as it is written, compiled by XLA: no part is replaced. Differentiable, and the default everywhere."""
