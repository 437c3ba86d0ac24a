"""Grouped feed-forward layers: each row through its own expert of a mixture.

On TPU and GPU XLA has a grouped product (``jax.lax.ragged_dot``). On a CPU that computes every row with every expert,
and for few rows a TPU v2 copies all experts first. There the rows go in blocks of one expert each, and the work grows
with the rows and the experts that have any.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jllm_core.ops.linear import linear, matmul_precision
from jllm_core.quantization.arrays import QuantizedArray, dequantize, entry
from jllm_core.weights import MoELayer

MAX_BLOCK_ROWS = 256


def grouped_mlp(x: Float[Array, "M D"], sizes: Int[Array, " E"], layer: MoELayer) -> Float[Array, "M D"]:
    """``(silu(x w_gate) * (x w_up)) w_down`` of each row by its own expert.

    Args:
        x: rows sorted by expert: the first ``sizes[0]`` are the first expert's, and so on.
        sizes: rows of each expert; what is left of the rows is zero in the result.
        layer: the experts.
    """
    if x.shape[0] <= layer.w_router.shape[1]:  # as in decoding: some of all experts have no row
        return mlp_by_blocks(x, sizes, layer)
    y: Array = jax.lax.platform_dependent(x, sizes, layer, cpu=mlp_by_blocks, default=mlp_by_ragged_dot)
    return y


def mlp_by_ragged_dot(x: Array, sizes: Array, layer: MoELayer) -> Array:
    """The three products as grouped ones."""

    def product(rows: Array, experts: Any) -> Array:
        if isinstance(experts, QuantizedArray):
            experts = dequantize(experts, rows.dtype)
        out: Array = jax.lax.ragged_dot(rows, experts, sizes, precision=matmul_precision(rows.dtype))
        return out

    hidden = jax.nn.silu(product(x, layer.we_gate)) * product(x, layer.we_up)
    owned = jnp.arange(x.shape[0]) < jnp.sum(sizes)
    return jnp.where(owned[:, None], product(hidden, layer.we_down), 0)


def mlp_by_blocks(x: Array, sizes: Array, layer: MoELayer) -> Array:
    """Block after block of rows, each with the weights of the one expert that its rows belong to.

    All blocks have the same number of rows, for with another number a product adds in another order: a row's bits would
    depend on how many neighbours its expert has. What is computed beyond an expert's own rows, the next overwrites.
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
