"""Many small feed-forward layers, each with its own rows: the experts of a mixture.

On TPU and GPU XLA has a grouped product (``jax.lax.ragged_dot``). On a CPU that computes every row with every expert,
so the rows are cut into blocks of one expert each, and the work grows with the rows alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jllm_core.quantized import QuantizedArray, dequantize, entry, matmul
from jllm_core.weights import MoELayer

LARGEST_BLOCK = 64
# Below this many rows an expert, one row at a time reads the weights faster than a product of a few rows.
FEW_ROWS = 8


def grouped_mlp(x: Float[Array, "M D"], sizes: Int[Array, " E"], layer: MoELayer) -> Float[Array, "M D"]:
    """``(silu(x w_gate) * (x w_up)) w_down`` of each row by its own expert.

    Args:
        x: rows sorted by expert: the first ``sizes[0]`` are the first expert's, and so on.
        sizes: rows of each expert; what is left of the rows is zero in the result.
        layer: the experts.
    """
    y: Array = jax.lax.platform_dependent(x, sizes, layer, cpu=mlp_by_blocks, default=mlp_by_ragged_dot)
    return y


def mlp_by_ragged_dot(x: Array, sizes: Array, layer: MoELayer) -> Array:
    """The three products as grouped ones."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def product(rows: Array, experts: Any) -> Array:
        if isinstance(experts, QuantizedArray):
            experts = dequantize(experts, rows.dtype)
        out: Array = jax.lax.ragged_dot(rows, experts, sizes, precision=precision)
        return out

    hidden = jax.nn.silu(product(x, layer.we_gate)) * product(x, layer.we_up)
    owned = jnp.arange(x.shape[0]) < jnp.sum(sizes)
    return jnp.where(owned[:, None], product(hidden, layer.we_down), 0)


def mlp_by_blocks(x: Array, sizes: Array, layer: MoELayer) -> Array:
    """Block after block of rows, each with the weights of the one expert that its rows belong to."""
    rows, experts = x.shape[0], sizes.shape[0]
    block = _block_rows(rows, experts)
    blocks = -(-sizes // block)
    first_row, first_block = jnp.cumsum(sizes) - sizes, jnp.cumsum(blocks) - blocks
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def take(_: None, number: Array) -> tuple[None, Array]:
        expert = jnp.searchsorted(jnp.cumsum(blocks), number, side="right")

        def work() -> Array:
            start = first_row[expert] + (number - first_block[expert]) * block
            piece = jax.lax.dynamic_slice_in_dim(padded, start, block)
            gate, up, down = (entry(matrix, expert) for matrix in (layer.we_gate, layer.we_up, layer.we_down))
            hidden = jax.nn.silu(matmul("RD,DF->RF", piece, gate)) * matmul("RD,DF->RF", piece, up)
            return matmul("RF,FD->RD", hidden, down)

        return None, jax.lax.cond(expert < experts, work, lambda: jnp.zeros((block, x.shape[1]), x.dtype))

    # At most one block of each expert is not full.
    most = min(rows, rows // block + experts)
    _, done = jax.lax.scan(take, None, jnp.arange(most))
    row = jnp.arange(rows)
    owner = jnp.searchsorted(jnp.cumsum(sizes), row, side="right")
    safe = jnp.minimum(owner, experts - 1)
    within = row - first_row[safe]
    place = (first_block[safe] + within // block) * block + within % block
    return jnp.where((owner < experts)[:, None], done.reshape(-1, x.shape[1])[place], 0)


def _block_rows(rows: int, experts: int) -> int:
    """Rows of a block: as many as an expert has on average, as a power of two."""
    average = rows // experts
    return 1 if average < FEW_ROWS else min(LARGEST_BLOCK, 1 << (average - 1).bit_length())
