"""Grouped feed-forward layers: each row through its own expert of a mixture.

XLA has a grouped product, ``jax.lax.ragged_dot``. Its compiler for TPUs from v4 on makes a kernel of it. That for TPUs
v2 and v3 copies all experts first; those for CPUs and GPUs multiply every row with every expert. There the rows go in
blocks of one expert each, and the work grows with the rows and the experts that have any. A backend chooses
(``Backend.experts``).
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jllm_core.ops.linear import linear, matmul_precision
from jllm_core.quantization.arrays import QuantizedArray, dequantize, entry
from jllm_core.weights import MoELayer

MAX_BLOCK_ROWS = 256


def mlp_by_ragged_dot(x: Float[Array, "M D"], sizes: Int[Array, " E"], layer: MoELayer) -> Float[Array, "M D"]:
    """``mlp_by_blocks``, the three products as grouped ones.

    Args:
        x, sizes, layer: as ``mlp_by_blocks`` takes them. Of quantised experts with groups it makes a copy, of all.
    """

    def product(rows: Array, experts: Any) -> Array:
        dot = partial(jax.lax.ragged_dot, rows, group_sizes=sizes, precision=matmul_precision(rows.dtype))
        if not isinstance(experts, QuantizedArray):
            plain: Array = dot(experts)
        elif experts.group is not None:
            plain = dot(dequantize(experts, rows.dtype))
        else:
            # The kernel reads int8, and the one scale of an output comes after the sum: no expert is copied.
            sums: Array = dot(experts.values, preferred_element_type=jnp.float32)
            plain = (sums * experts.scales[owners, 0]).astype(rows.dtype)
        return plain

    owners = jnp.repeat(jnp.arange(sizes.shape[0]), sizes, total_repeat_length=x.shape[0])
    hidden = jax.nn.silu(product(x, layer.we_gate)) * product(x, layer.we_up)
    owned = jnp.arange(x.shape[0]) < jnp.sum(sizes)
    return jnp.where(owned[:, None], product(hidden, layer.we_down), 0)


def mlp_by_blocks(x: Float[Array, "M D"], sizes: Int[Array, " E"], layer: MoELayer) -> Float[Array, "M D"]:
    """``(silu(x w_gate) * (x w_up)) w_down`` of each row by its own expert, block after block of rows of one expert.

    An expert without rows is not read, and of quantised experts none is copied but the one at hand. All blocks have the
    same number of rows, for with another number a product adds in another order: a row's bits would depend on how many
    neighbours its expert has. What is computed beyond an expert's own rows, the next overwrites.

    Args:
        x: rows sorted by expert: the first ``sizes[0]`` are the first expert's, and so on.
        sizes: rows of each expert; what is left of the rows is zero in the result.
        layer: the experts.
    """
    rows, experts = x.shape[0], sizes.shape[0]
    block = _block_rows(rows, layer.w_router.shape[1])
    blocks = -(-sizes // block)
    first_row, last_block = jnp.cumsum(sizes) - sizes, jnp.cumsum(blocks)
    padded = jnp.pad(x, ((0, block), (0, 0)))

    # Differentiated, a block is computed again rather than kept with a copy of its expert's weights.
    @jax.checkpoint
    def compute(start: Array, expert: Array) -> Array:
        piece = jax.lax.dynamic_slice_in_dim(padded, start, block)
        gate, up, down = (entry(matrix, expert) for matrix in (layer.we_gate, layer.we_up, layer.we_down))
        hidden = jax.nn.silu(linear("RD,DF->RF", piece, gate)) * linear("RD,DF->RF", piece, up)
        return linear("RF,FD->RD", hidden, down)

    def take(done: Array, number: Array) -> tuple[Array, None]:
        expert = jnp.searchsorted(last_block, number, side="right")

        def work() -> Array:
            start = first_row[expert] + (number - last_block[expert] + blocks[expert]) * block
            return jax.lax.dynamic_update_slice_in_dim(done, compute(start, expert), start, axis=0)

        return jax.lax.cond(expert < experts, work, lambda: done), None

    # At most one block of each expert is not full.
    most = min(rows, rows // block + experts)
    done, _ = jax.lax.scan(take, jnp.zeros_like(padded), jnp.arange(most))
    return jnp.where((jnp.arange(rows) < jnp.sum(sizes))[:, None], done[:rows], 0)


def _block_rows(rows: int, experts: int) -> int:
    """Rows of a block: what most experts need, of all there are, on this device or another.

    Chance alone gives an expert the average, give or take its root; a second block would read its weights again.
    """
    average = rows / experts
    needed = average + 2 * math.sqrt(average)
    return min(-(-int(needed) // 8) * 8 or 8, MAX_BLOCK_ROWS)
