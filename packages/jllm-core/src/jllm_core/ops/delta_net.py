"""Gated delta net (Yang et al., arXiv:2412.06464), as in Qwen3-Next and Qwen3.5.

A layer that keeps a matrix for each head in place of the keys and values of all tokens. A token lets the matrix decay,
reads what stands under its key, and writes the difference to its own value there (the delta rule)::

    M <- exp(g) M;   M <- M + k (beta (v - k^T M))^T;   y = q^T M

The letters are those of docs/notation.md; in equations ``h`` are key heads, ``r`` the value heads of each, ``n``
chunks, ``c`` and ``s`` tokens of a chunk, ``k`` and ``v`` the features of keys and values.

Reference: ``Qwen3_5GatedDeltaNet`` of transformers.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jllm_core.ops.linear import linear
from jllm_core.recurrent_state import RecurrentState
from jllm_core.weights import DeltaNetLayer

CHUNK = 64
"""Tokens that are taken at a time. A text that is cut at multiples of it has the same bits as in one piece."""

# The sums of a chunk undo one another: with fewer bits, what is left of a difference would be noise.
_product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def delta_net(
    x: Float[Array, "B T D"],
    w: DeltaNetLayer,
    state: RecurrentState | None,
    counts: Int[Array, " B"] | None,
    eps: float,
) -> tuple[Float[Array, "B T D"], RecurrentState]:
    """Project, convolve, read and write the state, normalise and gate, project back.

    Args:
        x: activations.
        w: the layer's arrays.
        state: what earlier tokens have left; None where there are none.
        counts: how many tokens of each row count, from its first on: what others give means nothing, and they leave no
            trace in the state. None is all of them.
        eps: the epsilon of the norm of the output.

    Returns:
        The result in the type of ``x``, and the state with the tokens that count.
    """
    state = no_state(len(x), w) if state is None else state
    with jax.named_scope("qkvz"):
        q, k = linear("BTD,DHK->BTHK", x, w.q), linear("BTD,DHK->BTHK", x, w.k)
        v, z = linear("BTD,DHK->BTHK", x, w.v), linear("BTD,DHK->BTHK", x, w.z)
        a, b = (linear("BTD,DH->BTH", x, matrix).astype(jnp.float32) for matrix in (w.a, w.b))
    # From here to the norm in float32 in a model of any type: what a state forgets in rounding is lost for good.
    q, q_tail = causal_conv(q, w.conv_q, state.q, counts)
    k, k_tail = causal_conv(k, w.conv_k, state.k, counts)
    v, v_tail = causal_conv(v, w.conv_v, state.v, counts)
    q, k = unit_length(q) * q.shape[-1] ** -0.5, unit_length(k)
    beta, g = jax.nn.sigmoid(b), -jnp.exp(w.a_log) * jax.nn.softplus(a + w.dt_bias)
    if counts is not None:
        # What does not count writes nothing and lets nothing decay. Zeros, for it may hold anything.
        counted = jnp.arange(x.shape[1]) < counts[:, None]
        k, v = (jnp.where(counted[..., None, None], heads, 0) for heads in (k, v))
        beta, g = (jnp.where(counted[..., None], numbers, 0) for numbers in (beta, g))
    rule = recurrent_delta_rule if x.shape[1] == 1 else chunked_delta_rule
    y, memory = rule(q, k, v, g, beta, state.memory)
    if counts is not None:
        memory = jnp.where((counts > 0)[:, None, None, None], memory, state.memory)
    y = gated_rms_norm(y, z, w.gamma, eps).astype(x.dtype)
    with jax.named_scope("o"):
        return linear("BTHK,HKD->BTD", y, w.o), RecurrentState(memory, q_tail, k_tail, v_tail)


@jax.named_scope("conv")
def causal_conv(
    x: Float[Array, "B T H K"],
    kernel: Float[Array, "W H K"],
    tail: Float[Array, "B tail H K"],
    counts: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B tail H K"]]:
    """SiLU of a convolution that sees, feature by feature, a token and the ``W - 1`` before it.

    Args:
        x: its inputs.
        kernel: a weight for each place, the oldest token's first.
        tail: the ``W - 1`` inputs before ``x``.
        counts: how many tokens of each row count; None is all of them.

    Returns:
        The result, in float32, and the last ``W - 1`` inputs that count.
    """
    seen = jnp.concatenate([tail, x.astype(jnp.float32)], axis=1)
    # W shifted products and not a convolution of XLA's, which would make a matrix product of W numbers.
    shifted = (seen[:, place : place + x.shape[1]] * weight for place, weight in enumerate(kernel.astype(jnp.float32)))
    y = jax.nn.silu(sum(shifted, start=jnp.float32(0)))
    if counts is None:
        return y, seen[:, x.shape[1] :]
    # The count-th input of a row is behind its tail: those that count last begin there.
    places = counts[:, None] + jnp.arange(tail.shape[1])
    return y, jnp.take_along_axis(seen, places[..., None, None], axis=1)


def unit_length(x: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
    """Each head as long as one, or shorter where it is nearly zero."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def gated_rms_norm(
    y: Float[Array, "B T Hv dv"], z: Float[Array, "B T Hv dv"], gamma: Float[Array, " dv"], eps: float
) -> Float[Array, "B T Hv dv"]:
    """``rms_norm(y) * gamma * silu(z)`` of each head, in float32."""
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return y * scale * gamma.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))


@jax.named_scope("recurrent_delta_rule")
def recurrent_delta_rule(
    q: Float[Array, "B 1 Hk dk"],
    k: Float[Array, "B 1 Hk dk"],
    v: Float[Array, "B 1 Hv dv"],
    g: Float[Array, "B 1 Hv"],
    beta: Float[Array, "B 1 Hv"],
    memory: Float[Array, "B Hv dk dv"],
) -> tuple[Float[Array, "B 1 Hv dv"], Float[Array, "B Hv dk dv"]]:
    """One token of each row; all in float32, as the arguments of ``chunked_delta_rule``."""
    # Sums and no products of matrices, whose order would depend on how many rows there are.
    q, k = (_for_value_heads(heads[:, 0], v.shape[2])[..., None] for heads in (q, k))
    memory = memory * jnp.exp(g[:, 0, :, None, None])
    change = (v[:, 0] - jnp.sum(memory * k, axis=2)) * beta[:, 0, :, None]
    memory = memory + k * change[:, :, None]
    return jnp.sum(memory * q, axis=2)[:, None], memory


@jax.named_scope("chunked_delta_rule")
def chunked_delta_rule(
    q: Float[Array, "B T Hk dk"],
    k: Float[Array, "B T Hk dk"],
    v: Float[Array, "B T Hv dv"],
    g: Float[Array, "B T Hv"],
    beta: Float[Array, "B T Hv"],
    memory: Float[Array, "B Hv dk dv"],
) -> tuple[Float[Array, "B T Hv dv"], Float[Array, "B Hv dk dv"]]:
    """The tokens of each row, CHUNK at a time: within a chunk by products of matrices, from one to the next in a loop.

    What the tokens of a chunk write depends on what those before them have written: a triangular system of equations,
    whose inverse ``(I + A)^-1`` is the same for all features (the WY form, arXiv:2406.06484; with decay, 2412.06464).

    Args:
        q: queries, of length ``dk ** -0.5``.
        k: keys, of length one.
        v: values.
        g: logarithms of the decay before each token, at most 0.
        beta: how much of the difference each token writes, 0 to 1.
        memory: what earlier tokens have left.
    """
    batch, tokens, heads = v.shape[:3]
    keys = k.shape[2]

    def chunks(array: Array, heads: tuple[int, ...]) -> Array:
        """``[B, T, H, ...]`` as ``[B, *heads, n, c, ...]``, filled up with zeros, which write nothing."""
        filled = jnp.pad(array, [(0, 0), (0, -tokens % CHUNK)] + [(0, 0)] * (array.ndim - 2))
        split = filled.reshape(batch, -1, CHUNK, *heads, *array.shape[3:])
        return jnp.moveaxis(split, (1, 2), (1 + len(heads), 2 + len(heads)))

    of_values = (keys, heads // keys)
    q, k = chunks(q, (keys,))[:, :, None], chunks(k, (keys,))[:, :, None]
    v, g, beta = chunks(v, of_values), chunks(g, of_values), chunks(beta, of_values)[..., None]

    since_start = jnp.cumsum(g, axis=-1)
    place = jnp.arange(CHUNK)
    # Masked before the exponential: what is masked is above 0 and may be more than a float holds.
    between = since_start[..., :, None] - since_start[..., None, :]
    decay = jnp.exp(jnp.where(place[:, None] >= place, between, -jnp.inf))
    since_start = jnp.exp(since_start)[..., None]
    until_end = decay[..., -1, :, None]

    both = _product("bhrnck,bhrnsk->bhrncs", jnp.concatenate([q, k], axis=2), k)
    seen, shared = both[:, :, :1] * decay, both[:, :, 1:] * decay
    inverse = unit_triangular_inverse(beta * shared)
    written = _product("bhrncs,bhrnsv->bhrncv", inverse, beta * v)
    read = _product("bhrncs,bhrnsk->bhrnck", inverse, beta * since_start * k)

    def take(memory: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, written, read, seen, decay = chunk
        change = written - _product("bhrck,bhrkv->bhrcv", read, memory)
        y = _product("bhrck,bhrkv->bhrcv", q, memory) + _product("bhrcs,bhrsv->bhrcv", seen, change)
        memory = memory * decay + _product("bhrck,bhrcv->bhrkv", k, change)
        return memory, y

    pieces = (q * since_start, k * until_end, written, read, seen, since_start[..., -1:, :])
    by_chunk = tuple(jnp.moveaxis(piece, 3, 0) for piece in pieces)
    memory, y = jax.lax.scan(take, memory.reshape(batch, *of_values, *memory.shape[2:]), by_chunk)
    y = y.reshape(-1, batch, heads, *y.shape[4:])
    y = jnp.moveaxis(y, (0, 3), (1, 2)).reshape(batch, -1, heads, v.shape[-1])[:, :tokens]
    return y, memory.reshape(batch, heads, *memory.shape[3:])


@jax.named_scope("unit_triangular_inverse")
def unit_triangular_inverse(a: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """``(I + A)^-1``, where A is the part of ``a`` below its diagonal; C is a power of two.

    Blocks of twice the size again and again: ``[[X, 0], [A, Y]]^-1 = [[X^-1, 0], [-Y^-1 A X^-1, Y^-1]]``. That is
    ``2 log2 C`` products for all blocks at once, where a substitution would take C steps one after another; and as
    exact, for no power of A, which may be large, is ever formed.
    """
    size = a.shape[-1]
    place = jnp.arange(size)

    def between(level: int | Array) -> Array:
        """Of each pair of blocks of ``2 ** level``, what is below the first and left of the second."""
        number = place >> level
        return jnp.where((number[:, None] % 2 == 1) & (number[:, None] == number + 1), a, 0)

    def merge(level: int | Array, inverse: Array) -> Array:
        return inverse - _product("...cs,...st,...tu->...cu", inverse, between(level), inverse)

    # Blocks of one are their own inverses. The others in a loop, for each product of a float's full precision is a
    # megabyte of a TPU's code and seconds of its compiler's time.
    inverse: Array = jax.lax.fori_loop(1, size.bit_length() - 1, merge, jnp.eye(size, dtype=a.dtype) - between(0))
    return inverse


def _for_value_heads(x: Float[Array, "B Hk dk"], heads: int) -> Float[Array, "B Hv dk"]:
    """Each key head once for each of the value heads that it serves, which are neighbours."""
    return jnp.repeat(x, heads // x.shape[1], axis=1)


def no_state(rows: int, w: DeltaNetLayer) -> RecurrentState:
    """The state before the first token."""
    (_, heads, dv), (size, keys, dk) = w.conv_v.shape, w.conv_k.shape
    tail = jnp.zeros((rows, size - 1, keys, dk), jnp.float32)
    return RecurrentState(
        memory=jnp.zeros((rows, heads, dk, dv), jnp.float32),
        q=tail,
        k=tail,
        v=jnp.zeros((rows, size - 1, heads, dv), jnp.float32),
    )
