"""Layers on a CPU.

XLA computes a layer as some thirty operations, and converts weights that are not float32 in memory before it multiplies
with them. Here it is two kernels with the write to the KV cache between them, and with it the attention of a prompt.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jllm_core.cache import Cache, KVCache, NoCache, PagedKVCache
from jllm_core.config import ModelConfig
from jllm_core.kernels import cpu_ffi
from jllm_core.kernels.attention import attend
from jllm_core.quantized import QuantizedArray
from jllm_core.quantized_slots import QuantizedSlots, Slots
from jllm_core.sharding import Placement
from jllm_core.weights import Layer, MLPLayer

MOST_TOKENS = 16
"""New tokens of a text that are still decoding: each attends for itself. More of them are a prompt, and share keys."""
PLAIN_TYPES = ("float32", "bfloat16")


def runs_here(dtype: Any, placement: Placement | None) -> bool:
    """Whether activations of this type go through the kernels: on one CPU."""
    return jnp.dtype(dtype).name in PLAIN_TYPES and is_one_cpu(placement) and cpu_ffi.available()


def is_one_cpu(placement: Placement | None) -> bool:
    """Whether all is on one CPU that is really there, and kernels are wanted on it."""
    return placement is not None and placement.is_one_cpu and isinstance(placement.mesh, Mesh)


def take_rows(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], placement: Placement | None
) -> Float[Array, "B T D"]:
    """``table[tokens]``. Of bfloat16 XLA on a CPU would make another type of the whole table first."""
    if table.dtype != jnp.bfloat16 or not runs_here(table.dtype, placement):
        return table[tokens]
    from jllm_core.kernels.cpu_kernels import Rows

    operands = {"table": table, "tokens": tokens.reshape(-1).astype(jnp.int32)}
    (rows,) = cpu_ffi.call(Rows(table.dtype.name), operands, [(tokens.size, table.shape[1])])
    return rows.reshape(*tokens.shape, table.shape[1]).astype(table.dtype)


def supports(
    x: Float[Array, "B T D"], layer: Layer, config: ModelConfig, cache: KVCache, placement: Placement | None
) -> bool:
    """Whether ``block`` below takes this layer. Without a cache, gradients may be asked for, which kernels have not."""
    if isinstance(cache, NoCache) or not runs_here(x.dtype, placement):
        return False
    from jllm_core.kernels.cpu_attention import MOST_QUERIES
    from jllm_core.kernels.cpu_code import LANES

    matrices = [layer.attn.q, layer.attn.k, layer.attn.v, layer.attn.o]
    if isinstance(layer.ffw, MLPLayer):
        matrices += [layer.ffw.w_gate, layer.ffw.w_up, layer.ffw.w_down]
    heads_fit = config.head_dim % LANES == 0 and config.num_heads // config.num_kv_heads <= MOST_QUERIES
    return heads_fit and all(map(_is_known, matrices))


def block(
    x: Float[Array, "B T D"],
    layer: Layer,
    config: ModelConfig,
    rotation: tuple[Array, Array],
    positions: Int[Array, "B T"],
    cache: Cache,
    number: int,
    placement: Placement | None,
) -> tuple[Float[Array, "B T D"], Cache]:
    """``model.block``; of a layer with experts, its attention part alone. Sums are in float32 for every type of x."""
    from jllm_core.kernels.cpu_attention import IN_ORDER, PAGED, PLACED, SPLIT

    batch, queries, width = x.shape
    rows = x.astype(jnp.float32).reshape(-1, width)
    q, k, v = _project(rows, layer, config, rotation, number)
    k, v = (heads.reshape(batch, queries, *heads.shape[1:]) for heads in (k, v))
    if queries > MOST_TOKENS:
        cache, attended = _attend_to_prompt(q, k, v, config, positions, cache, number, placement)
        y = _close(rows, attended, layer, config.rms_norm_eps)
        return y.reshape(x.shape).astype(x.dtype), cache
    if isinstance(cache, PagedKVCache) and cache.page_size <= SPLIT:
        cache, keys, values = cache.append_in_place(number, k, v, positions)
        order = (PAGED, {"tables": cache.tables.astype(jnp.int32)})
    else:
        cache, keys, values, k_positions = cache.append(number, k, v, positions)
        order = (IN_ORDER, {}) if k_positions is None else (PLACED, {"k_positions": k_positions.astype(jnp.int32)})
    y = _attend_and_close(rows, q, keys, values, positions, order, layer, config, number)
    return y.reshape(x.shape).astype(x.dtype), cache


def head(x: Float[Array, "*rows D"], w: Any, transposed: bool) -> Float[Array, "*rows V"]:
    """The logits, in float32, by ``w [D, V]`` or by a tied embedding ``[V, D]``."""
    from jllm_core.kernels.cpu_kernels import Head

    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    matrix, operands = _matrix("w", w)
    outs = w.shape[0] if transposed else w.shape[1]
    (y,) = cpu_ffi.call(Head(matrix, transposed), {"x": rows, **operands}, [(rows.shape[0], outs)])
    return y.reshape(*x.shape[:-1], outs)


def norm(x: Float[Array, "*rows D"], gamma: Float[Array, " D"], eps: float) -> Float[Array, "*rows D"]:
    """``ops.norm.rms_norm``."""
    from jllm_core.kernels.cpu_kernels import Norm

    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    (y,) = cpu_ffi.call(Norm(gamma.dtype.name), {"x": rows, "gamma": gamma}, [rows.shape], eps=np.float32(eps))
    return y.reshape(x.shape).astype(x.dtype)


def write_slots(
    slots: Slots,
    new: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    rows: Int[Array, "B T"] | None = None,
) -> Slots:
    """A KV cache with ``new`` at these rows and positions, in place; what is outside is dropped.

    XLA on a CPU would make float32 of a whole bfloat16 cache, and back, to write into it.

    Args:
        slots: keys or values ``[R, K, S, H]``.
        new: what to write.
        positions: the slot of each token.
        rows: the row of each; None is row b for ``new[b]``.
    """
    from jllm_core.kernels.cpu_slots import Quantize, Write

    if rows is None:
        rows = jnp.broadcast_to(jnp.arange(new.shape[0])[:, None], positions.shape)
    places = {"rows": rows.astype(jnp.int32), "positions": positions.astype(jnp.int32)}
    if isinstance(slots, QuantizedSlots):
        operands = {"slots": slots.values, "scales": slots.scales, "new": new.astype(jnp.float32), **places}
        return QuantizedSlots(*cpu_ffi.call(Quantize(), operands, [slots.values, slots.scales], {0: 0, 1: 1}))
    operands = {"slots": slots, "new": new.astype(jnp.float32), **places}
    return cpu_ffi.call(Write(slots.dtype.name), operands, [slots], {0: 0})[0]


def untouched(like: Any) -> Any:
    """Arrays of the shapes and types in a tree of them, that hold anything. They take up memory as they are written:
    gigabytes of zeros take seconds."""
    from jllm_core.kernels.cpu_slots import Untouched

    leaves, tree = jax.tree.flatten(like)
    return jax.tree.unflatten(tree, cpu_ffi.call(Untouched(), {}, leaves))


def supports_head(x: Float[Array, "*rows D"], w: Any, placement: Placement | None) -> bool:
    """Whether ``head`` above takes these rows."""
    return _is_known(w) and runs_here(x.dtype, placement)


def _project(
    x: Float[Array, "R D"], layer: Layer, config: ModelConfig, rotation: tuple[Array, Array], number: int
) -> list[Array]:
    from jllm_core.kernels.cpu_kernels import Attend

    w, rows, half = layer.attn, x.shape[0], config.head_dim // 2
    matrices, operands = _matrices(("q", w.q, w.q_bias), ("k", w.k, w.k_bias), ("v", w.v, w.v_bias))
    operands |= {"x": x, "gamma": layer.attn_pre_gamma}
    head_norms = w.q_gamma is not None and w.k_gamma is not None
    if w.q_gamma is not None and w.k_gamma is not None:
        operands |= {"q_gamma": w.q_gamma, "k_gamma": w.k_gamma}
    if rotates := config.rotates(number):
        cos, sin = (jnp.broadcast_to(angles, (*angles.shape[:2], 1, half)).reshape(rows, half) for angles in rotation)
        operands |= {"cos": cos, "sin": sin}
    heads = [(rows, *matrix.shape[1:]) for matrix in (w.q, w.k, w.v)]
    kernel = Attend(matrices, head_norms, rotates, layer.attn_pre_gamma.dtype.name)
    return cpu_ffi.call(kernel, operands, [*heads, x.shape], eps=np.float32(config.rms_norm_eps))[:3]


def _attend_and_close(
    x: Float[Array, "R D"],
    q: Float[Array, "R N H"],
    keys: Slots,
    values: Slots,
    positions: Int[Array, "B T"],
    order: tuple[str, dict[str, Array]],
    layer: Layer,
    config: ModelConfig,
    number: int,
) -> Float[Array, "R D"]:
    from jllm_core.kernels.cpu_attention import SPLIT
    from jllm_core.kernels.cpu_code import LANES
    from jllm_core.kernels.cpu_kernels import Finish

    close, operands, workspaces = _closing(x, layer)
    for names, slots in ((("keys", "key_scales"), keys), (("values", "value_scales"), values)):
        operands |= dict(zip(names, _parts(slots), strict=False))
    operands |= {"q": q, "positions": positions.reshape(-1).astype(jnp.int32)}
    named, places = order
    operands |= places
    rows, heads, width = q.shape
    splits = places["tables"].shape[1] if "tables" in places else -(-keys.shape[2] // SPLIT)
    results = [x.shape, (rows, heads, splits, width + LANES), (rows, heads * width), *workspaces]
    kernel = Finish(operands["keys"].dtype.name, named, close)
    window = np.int64(config.window(number) or 0)
    eps = np.float32(config.rms_norm_eps)
    return cpu_ffi.call(kernel, operands, results, eps=eps, window=window)[0]


def _attend_to_prompt(
    q: Float[Array, "R N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    config: ModelConfig,
    positions: Int[Array, "B T"],
    cache: Cache,
    number: int,
    placement: Placement | None,
) -> tuple[Cache, Float[Array, "R A"]]:
    """Remember, and attend, ``A = N * H``."""
    from jllm_core.kernels.cpu_attention import IN_ORDER, PAGED
    from jllm_core.kernels.cpu_code import LANES
    from jllm_core.kernels.cpu_prompt import MOST_HEAD, Prompt

    window = config.window(number)
    fits = config.head_dim <= MOST_HEAD
    if isinstance(cache, PagedKVCache) and cache.page_size % LANES == 0 and fits:
        cache, keys, values = cache.append_in_place(number, k, v, positions)
        order, operands = PAGED, {"tables": cache.tables.astype(jnp.int32)}
    else:
        cache, keys, values, k_positions = cache.append(number, k, v, positions)
        if k_positions is not None or keys.shape[2] % LANES or not fits:
            heads = q.reshape(*positions.shape, *q.shape[1:])
            attended = attend(heads, keys, values, positions, k_positions, window, placement)
            return cache, attended.reshape(len(q), -1)
        order, operands = IN_ORDER, {}
    for names, slots in ((("keys", "key_scales"), keys), (("values", "value_scales"), values)):
        operands |= dict(zip(names, _parts(slots), strict=False))
    operands |= {"q": q, "positions": positions.astype(jnp.int32)}
    shape = (len(q), q.shape[1] * q.shape[2])
    kernel = Prompt(operands["keys"].dtype.name, order)
    return cache, cpu_ffi.call(kernel, operands, [shape], window=np.int64(window or 0))[0]


def _close(x: Float[Array, "R D"], attended: Float[Array, "R A"], layer: Layer, eps: float) -> Float[Array, "R D"]:
    close, operands, workspaces = _closing(x, layer)
    operands["attended"] = attended.astype(jnp.float32)
    return cpu_ffi.call(close, operands, [x.shape, *workspaces], eps=np.float32(eps))[0]


def _closing(x: Float[Array, "R D"], layer: Layer) -> tuple[Any, dict[str, Array], list[tuple[int, ...]]]:
    """What comes behind attention: the kernel, its operands but ``attended``, and the shapes of its workspaces."""
    from jllm_core.kernels.cpu_kernels import Close

    (o,), operands = _matrices(("o", layer.attn.o, layer.attn.o_bias))
    operands["x"] = x
    workspaces: list[tuple[int, ...]] = [x.shape]
    feed_forward, mlp = None, layer.ffw
    if isinstance(mlp, MLPLayer):
        given = (("gate", mlp.w_gate, mlp.b_gate), ("up", mlp.w_up, mlp.b_up), ("down", mlp.w_down, mlp.b_down))
        feed_forward, arrays = _matrices(*given)
        operands |= {**arrays, "gamma": layer.attn_post_gamma}
        workspaces += [(x.shape[0], mlp.w_up.shape[1])] * 2
    return Close(o, feed_forward, layer.attn_post_gamma.dtype.name), operands, workspaces


def _parts(slots: Slots) -> list[Array]:
    """The arrays that keys or values are made of, in a type that kernels read."""
    if isinstance(slots, QuantizedSlots):
        return [slots.values, slots.scales]
    return [slots if slots.dtype.name in PLAIN_TYPES else slots.astype(jnp.float32)]


def _is_known(w: Any) -> bool:
    return isinstance(w, QuantizedArray) or w.dtype.name in PLAIN_TYPES


def _float(array: Any) -> Array:
    converted: Array = array.astype(jnp.float32)
    return converted


def _matrices(*given: tuple[str, Any, Array | None]) -> tuple[tuple[Any, ...], dict[str, Array]]:
    """Matrices by name, with their biases: what kernels know of them, and their operands together."""
    matrices: list[Any] = []
    operands: dict[str, Array] = {}
    for name, w, bias in given:
        matrix, arrays = _matrix(name, w, bias)
        matrices.append(matrix)
        operands |= arrays
    return tuple(matrices), operands


def _matrix(name: str, w: Any, bias: Array | None = None) -> tuple[Any, dict[str, Array]]:
    from jllm_core.kernels.cpu_products import Kind
    from jllm_core.kernels.cpu_steps import Matrix

    operands = {} if bias is None else {f"{name}_bias": _float(bias)}
    if not isinstance(w, QuantizedArray):
        return Matrix(name, Kind(w.dtype.name), bias is not None), {name: w, **operands}
    operands |= {name: w.values, f"{name}_scales": w.scales}
    if w.offsets is not None:
        operands[f"{name}_offsets"] = w.offsets
    return Matrix(name, Kind(f"int{w.bits}", w.group or 0, w.offsets is not None), bias is not None), operands
