"""Layers on a CPU: calls of the kernels, with their operands.

A layer of tokens that decode is one kernel (``Step``). Of a prompt it is two, ``Project`` and ``Close``, with the KV
cache and attention (``Prompt``) between them.
"""

from dataclasses import replace
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jllm_core.backends.cpu import ffi
from jllm_core.backends.slot_cache import SlotCache
from jllm_core.config import ModelConfig
from jllm_core.kv_cache import Cache, KVCache, PagedSlots
from jllm_core.model import Call
from jllm_core.ops.attention import attention
from jllm_core.ops.linear import Matrix
from jllm_core.quantization.arrays import QuantizedArray
from jllm_core.quantization.keys_values import QuantizedSlots, Slots
from jllm_core.weights import AttentionLayer, Layer, Leaf, MLPLayer

MAX_DECODE_TOKENS = 16
"""New tokens of a text that are still decoding: each attends for itself. More of them are a prompt, and share keys."""
PLAIN_TYPES = ("float32", "bfloat16", "float16")


def heads_fit(config: ModelConfig) -> bool:
    """Whether the kernels take these heads: whole vectors, and few query heads to a kv head."""
    from jllm_core.backends.cpu.decode_attention import MAX_QUERIES
    from jllm_core.backends.cpu.llvm_builder import LANES

    return config.head_dim % LANES == 0 and config.num_heads // config.num_kv_heads <= MAX_QUERIES


def prompts_fit(config: ModelConfig) -> bool:
    """Whether prompts attend by a kernel as well, which passes over slots that hold nothing; XLA's operations multiply
    them by a weight of zero."""
    from jllm_core.backends.cpu.prompt_attention import MAX_HEAD

    return heads_fit(config) and config.head_dim <= MAX_HEAD


def apply_layer(
    x: Float[Array, "B T D"], layer: Layer, number: int, cache: Cache, call: Call
) -> tuple[Float[Array, "B T D"], Cache]:
    """``model.apply_layer``; of a layer with experts, its attention part alone. Sums are in float32."""
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    if call.positions.shape[1] <= MAX_DECODE_TOKENS and _is_open(cache, number):
        cache, y = _step(rows, layer, number, cache, call)
    else:
        q, k, v, *gates = _project(rows, layer, number, call)
        k, v = (heads.reshape(*call.positions.shape, *heads.shape[1:]) for heads in (k, v))
        cache, attended = _attend_to_prompt(q, k, v, number, cache, call)
        for gate in gates:
            attended = attended * gate.reshape(attended.shape)
        y = _close(rows, attended, layer, call)
    return y.reshape(x.shape).astype(x.dtype), cache


def _is_open(cache: KVCache, number: int) -> bool:
    """Whether ``Step`` takes a layer of this cache."""
    from jllm_core.backends.cpu.decode_attention import SPLIT

    if not isinstance(cache, SlotCache):
        return False
    keys, _ = cache.slots(number)
    known = isinstance(keys, QuantizedSlots) or keys.dtype.name in PLAIN_TYPES
    return known and (cache.tables is None or keys.shape[2] <= SPLIT)


def _step(x: Float[Array, "R D"], layer: Layer, number: int, cache: Any, call: Call) -> tuple[Any, Float[Array, "R D"]]:
    """A layer whose tokens attend each for itself, over the cache as it lies."""
    from jllm_core.backends.cpu.decode_attention import SPLIT
    from jllm_core.backends.cpu.layer_kernels import Step
    from jllm_core.backends.cpu.llvm_builder import LANES

    config, positions = call.config, call.positions
    project, operands, heads = _projecting(x, layer, number, call)
    close, weights, workspaces = closing(x, _attention(layer).o, _attention(layer).o_bias, layer, call)
    keys, values = cache.slots(number)
    at_rows, at_slots = cache.places(positions)
    places = {"positions": positions, "at_rows": at_rows, "at_slots": at_slots}
    if cache.tables is not None:
        places["tables"] = cache.tables
    operands |= weights | _slots(keys, values) | {name: place.astype(jnp.int32) for name, place in places.items()}
    (rows, count, width), slots = heads[0], keys.shape[2]
    splits = -(-slots // SPLIT) if cache.tables is None else cache.tables.shape[1]
    kernel = Step(project, operands["keys"].dtype.name, cache.tables is not None, close)
    kept = [operands[name] for name in kernel.slots]
    parts = (rows, count, splits, width + LANES)
    y, *made = ffi.call(
        kernel,
        operands,
        [x.shape, *kept, *heads, x.shape, parts, (rows, count * width), *workspaces],
        {place: place + 1 for place in range(len(kept))},
        eps=np.float32(config.rms_norm_eps),
        window=np.int64(config.window(number) or 0),
    )
    if isinstance(keys, QuantizedSlots):
        keys, values = QuantizedSlots(made[0], made[2]), QuantizedSlots(made[1], made[3])
    else:
        keys, values = made[0], made[1]
    return cache.with_slots(number, keys, values), y


def _attention(layer: Layer) -> AttentionLayer:
    # Others are taken by ``delta_net_calls``.
    return cast(AttentionLayer, layer.attn)


def _project(x: Float[Array, "R D"], layer: Layer, number: int, call: Call) -> list[Array]:
    kernel, operands, heads = _projecting(x, layer, number, call)
    return ffi.call(kernel, operands, [*heads, x.shape], eps=np.float32(call.config.rms_norm_eps))[:-1]


def _projecting(
    x: Float[Array, "R D"], layer: Layer, number: int, call: Call
) -> tuple[Any, dict[str, Array], list[tuple[int, ...]]]:
    """What comes before attention: the kernel, its operands, and the shapes of queries, keys, values and gates."""
    from jllm_core.backends.cpu.layer_inputs import Project

    config, w, rows = call.config, _attention(layer), x.shape[0]
    gate = [] if w.gate is None else [("attn_gate", w.gate, None)]
    matrices, operands = matrices_of(
        ("q", w.q, w.q_bias), ("k", w.k, w.k_bias), ("v", w.v, w.v_bias), *gate, rounded=rounds_prompts(layer, call)
    )
    operands |= {"x": x, "pre_gamma": layer.attn_pre_gamma}
    head_norms = w.q_gamma is not None and w.k_gamma is not None
    if w.q_gamma is not None and w.k_gamma is not None:
        operands |= {"q_gamma": w.q_gamma, "k_gamma": w.k_gamma}
    if rotates := config.rotates(number):
        cos, sin = (angles.reshape(rows, -1) for angles in call.rotation)
        operands |= {"cos": cos, "sin": sin}
    heads = [(rows, *matrix.shape[1:]) for matrix in (w.q, w.k, w.v, w.gate) if matrix is not None]
    return Project(matrices, head_norms, rotates, gamma_of(layer.attn_pre_gamma, config)), operands, heads


def _attend_to_prompt(
    q: Float[Array, "R N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    number: int,
    cache: Cache,
    call: Call,
) -> tuple[Cache, Float[Array, "R A"]]:
    """Append to the cache, and attend; ``A = N * H``."""
    from jllm_core.backends.cpu.llvm_builder import LANES
    from jllm_core.backends.cpu.prompt_attention import MAX_HEAD, Prompt

    config, positions, tables = call.config, call.positions, None
    keys: Slots | PagedSlots
    values: Slots | PagedSlots
    window = config.window(number)
    fits = config.head_dim <= MAX_HEAD
    if fits and isinstance(cache, SlotCache) and cache.slots(number)[0].shape[2] % LANES == 0:
        cache = cache.append_in_place(number, k, v, positions)
        (keys, values), tables = cache.slots(number), cache.tables
    else:
        cache, keys, values, k_positions = cache.append(number, k, v, positions)
        if (
            isinstance(keys, PagedSlots)
            or isinstance(values, PagedSlots)
            or k_positions is not None
            or keys.shape[2] % LANES
            or not fits
        ):
            heads = q.reshape(*positions.shape, *q.shape[1:])
            attend = call.backend.attention or attention
            attended = attend(heads, keys, values, positions, k_positions, window)
            return cache, attended.reshape(len(q), -1)
    operands = {"q": q, "positions": positions.astype(jnp.int32), **_slots(keys, values)}
    if tables is not None:
        operands["tables"] = tables.astype(jnp.int32)
    shape = (len(q), q.shape[1] * q.shape[2])
    kernel = Prompt(operands["keys"].dtype.name, tables is not None)
    return cache, ffi.call(kernel, operands, [shape], window=np.int64(window or 0))[0]


def _close(x: Float[Array, "R D"], attended: Float[Array, "R A"], layer: Layer, call: Call) -> Float[Array, "R D"]:
    w = _attention(layer)
    close, operands, workspaces = closing(x, w.o, w.o_bias, layer, call)
    operands["attended"] = attended.astype(jnp.float32)
    return ffi.call(close, operands, [x.shape, *workspaces], eps=np.float32(call.config.rms_norm_eps))[0]


def closing(
    x: Float[Array, "R D"], o: Leaf, bias: Array | None, layer: Layer, call: Call
) -> tuple[Any, dict[str, Array], list[tuple[int, ...]]]:
    """What comes behind attention or a delta net: the kernel, its operands but ``attended``, and the shapes of its
    workspaces."""
    from jllm_core.backends.cpu.layer_kernels import Close

    rounded = rounds_prompts(layer, call)
    (matrix,), operands = matrices_of(("o", o, bias), rounded=rounded)
    operands["x"] = x
    workspaces: list[tuple[int, ...]] = [x.shape]
    feed_forward, mlp = None, layer.ffw
    if isinstance(mlp, MLPLayer):
        given = (("gate", mlp.w_gate, mlp.b_gate), ("up", mlp.w_up, mlp.b_up), ("down", mlp.w_down, mlp.b_down))
        feed_forward, arrays = matrices_of(*given, rounded=rounded)
        operands |= {**arrays, "post_gamma": layer.attn_post_gamma}
        workspaces += [(x.shape[0], mlp.w_up.shape[1])] * 2
    return Close(matrix, feed_forward, gamma_of(layer.attn_post_gamma, call.config)), operands, workspaces


def gamma_of(gamma: Array, config: ModelConfig) -> Any:
    """What a kernel knows of the weights of a norm of this model."""
    from jllm_core.backends.cpu.kernel_building_blocks import Gamma

    return Gamma(gamma.dtype.name, config.centered_norm)


def _slots(keys: Slots, values: Slots) -> dict[str, Array]:
    """The arrays that keys and values are made of, in a type that kernels read."""
    if isinstance(keys, QuantizedSlots) and isinstance(values, QuantizedSlots):
        scales = {"key_scales": keys.scales, "value_scales": values.scales}
        return {"keys": keys.values, "values": values.values, **scales}
    return {"keys": _known(keys), "values": _known(values)}


def _known(array: Any) -> Array:
    known: Array = array if array.dtype.name in PLAIN_TYPES else array.astype(jnp.float32)
    return known


def is_known(w: Any) -> bool:
    """Whether kernels multiply by a matrix of this type."""
    # Of the matrices that multiply themselves they know quantised ones alone.
    return isinstance(w, QuantizedArray) or (not isinstance(w, Matrix) and w.dtype.name in PLAIN_TYPES)


def _float(array: Any) -> Array:
    converted: Array = array.astype(jnp.float32)
    return converted


def rounds_prompts(layer: Layer, call: Call) -> bool:
    """Whether products of a prompt may take activations in bfloat16, as the rest of a bfloat16 model has them.

    Only of models with delta nets: those without, which are older here, keep the bits that they have given so far.
    """
    from jllm_core.backends.cpu.rounded_matmul import has_bfloat16_products

    is_prompt = call.positions.shape[1] > MAX_DECODE_TOKENS
    of_type = call.config.delta_net is not None and layer.attn_pre_gamma.dtype == jnp.bfloat16
    return is_prompt and of_type and has_bfloat16_products()


def matrices_of(
    *given: tuple[str, Any, Array | None], rounded: bool = False
) -> tuple[tuple[Any, ...], dict[str, Array]]:
    """Matrices by name, with their biases: what kernels know of them, and their operands together; ``rounded`` as
    ``rounds_prompts`` says."""
    matrices: list[Any] = []
    operands: dict[str, Array] = {}
    for name, w, bias in given:
        matrix, arrays = as_matrix(name, w, bias)
        matrices.append(replace(matrix, kind=replace(matrix.kind, rounded=rounded)))
        operands |= arrays
    return tuple(matrices), operands


def as_matrix(name: str, w: Any, bias: Array | None = None) -> tuple[Any, dict[str, Array]]:
    """What a kernel knows of a matrix, and the operands that it is made of."""
    from jllm_core.backends.cpu.few_row_matmul import Kind
    from jllm_core.backends.cpu.kernel_building_blocks import Matrix

    operands = {} if bias is None else {f"{name}_bias": _float(bias)}
    if not isinstance(w, QuantizedArray):
        return Matrix(name, Kind(w.dtype.name), bias is not None), {name: w, **operands}
    operands |= {name: w.values, f"{name}_scales": w.scales}
    if w.offsets is not None:
        operands[f"{name}_offsets"] = w.offsets
    return Matrix(name, Kind(f"int{w.bits}", w.group or 0, w.offsets is not None), bias is not None), operands
