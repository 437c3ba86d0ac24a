"""CPU backends: blocked attention by XLA, and kernels of our own for single parts or whole layers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jllm_core import model
from jllm_core.backends.base import Backend
from jllm_core.backends.cpu import blocked_attention, delta_net_calls, ffi
from jllm_core.backends.cpu import layer_calls as layer_calls
from jllm_core.backends.cpu.layer_calls import PLAIN_TYPES, as_matrix, is_known
from jllm_core.config import ModelConfig
from jllm_core.kv_cache import KVCache, PagedSlots
from jllm_core.ops.attention import attention
from jllm_core.quantization.arrays import QuantizedArray
from jllm_core.quantization.keys_values import QuantizedSlots, Slots
from jllm_core.weights import DeltaNetLayer, Layer, Leaf, MLPLayer, Weights


class XLAOnCPU(Backend):
    """XLA on one CPU: the maths as it is written, but attention of many queries reads only the slots that they see."""

    def attention(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B K S H"] | QuantizedSlots | PagedSlots,
        v: Float[Array, "B K S H"] | QuantizedSlots | PagedSlots,
        q_positions: Int[Array, "B T"],
        k_positions: Int[Array, "B S"] | None = None,
        window: int | None = None,
    ) -> Float[Array, "B T N H"]:
        """``ops.attention.attention``; in blocks of keys where slot s stands at position s."""
        if k_positions is None and blocked_attention.supports(q.shape[1], k.shape[2]):
            k = k.gathered() if isinstance(k, PagedSlots) else k
            v = v.gathered(q_positions[:, -1:]) if isinstance(v, PagedSlots) else v
            return blocked_attention.attention(q, k, v, q_positions, window)
        attended: Array = attention(q, k, v, q_positions, k_positions, window)
        return attended

    def attention_bytes(self, q: Any, k: Any, queries: int, held: tuple[int, ...], window: int | None) -> int:
        """``Backend.attention_bytes``."""
        if blocked_attention.supports(q.shape[1], held[2]):
            # Scores of one block, and the running sums that are kept twice while they are added to; float32.
            block: int = queries * (blocked_attention.BLOCKS[0] + 2 * q.shape[3]) * 4
            return block
        return super().attention_bytes(q, k, queries, held, window)


class CPUKernels(XLAOnCPU):
    """Kernels for all but the layers: embedding, last norm, output head, choice of tokens, writes to a cache.

    XLA on a CPU makes float32 of whole arrays that are bfloat16 before it uses a row of them, and the order of its sums
    goes by the number of rows.
    """

    max_step_tokens = layer_calls.MAX_DECODE_TOKENS

    def embed(self, tokens: Int[Array, "B T"], weights: Weights) -> Float[Array, "B T D"]:
        """``model.embed``."""
        table = weights.embedding
        if isinstance(table, QuantizedArray) or table.dtype != jnp.bfloat16:
            return model.embed(tokens, weights)
        from jllm_core.backends.cpu.embedding_and_head import Rows

        operands = {"table": table, "tokens": tokens.reshape(-1).astype(jnp.int32)}
        (rows,) = ffi.call(Rows(table.dtype.name), operands, [(tokens.size, table.shape[1])])
        return rows.reshape(*tokens.shape, table.shape[1]).astype(table.dtype)

    def final_norm(self, x: Float[Array, "*rows D"], weights: Weights, config: ModelConfig) -> Float[Array, "*rows D"]:
        """``model.final_norm``, in the type of the weights."""
        return norm(x, weights.gamma_final, config.rms_norm_eps, config.centered_norm).astype(weights.dtype)

    def unembed(self, x: Float[Array, "*rows D"], weights: Weights) -> Float[Array, "*rows V"]:
        """``model.unembed``."""
        tied = weights.lm_head is None
        w: Leaf = weights.embedding if tied else weights.lm_head
        if not is_known(w):
            return model.unembed(x, weights)
        return head(x, w, transposed=tied)

    def thresholds(self, logits: Float[Array, "B V"], k: Int[Array, " B"], p: Float[Array, " B"]) -> Float[Array, " B"]:
        """``ops.sampling.thresholds``."""
        from jllm_core.backends.cpu.sampling_kernels import Threshold

        operands = {"logits": logits, "k": k.astype(jnp.int32), "p": p.astype(jnp.float32)}
        return ffi.call(Threshold(), operands, [(len(logits),), logits.shape])[0]

    def draw(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        """``ops.sampling.draw``."""
        return _pick(noisy=True, logits=logits, keys=jax.random.key_data(keys))

    def argmax(self, logits: Float[Array, "B V"]) -> Int[Array, " B"]:
        """``ops.sampling.argmax``."""
        return _pick(noisy=False, logits=logits)

    def write_slots(
        self,
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
        from jllm_core.backends.cpu.cache_writes import Write

        if rows is None:
            rows = jnp.broadcast_to(jnp.arange(new.shape[0])[:, None], positions.shape)
        places = {"rows": rows.astype(jnp.int32), "positions": positions.astype(jnp.int32)}
        if isinstance(slots, QuantizedSlots):
            operands = {"slots": slots.values, "scales": slots.scales, "new": new.astype(jnp.float32), **places}
            return QuantizedSlots(*ffi.call(Write("int8"), operands, [slots.values, slots.scales], {0: 0, 1: 1}))
        operands = {"slots": slots, "new": new.astype(jnp.float32), **places}
        return ffi.call(Write(slots.dtype.name), operands, [slots], {0: 0})[0]

    def uninitialized(self, like: Any) -> Any:
        """Arrays of the shapes and types in a tree of them, that hold anything.

        They take up memory as they are written: gigabytes of zeros take seconds.
        """
        from jllm_core.backends.cpu.cache_writes import Untouched

        # JAX_DEBUG_NANS looks at all of an array, and what was in memory may be no number.
        if jax.config.jax_debug_nans or jax.config.jax_debug_infs:  # type: ignore[attr-defined]  # not in their stubs
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        leaves, tree = jax.tree.flatten(like)
        return jax.tree.unflatten(tree, ffi.call(Untouched(), {}, leaves))

    def probes(self) -> Any:
        """``probes.read`` and ``probes.multiply``."""
        from jllm_core.backends.cpu import probes

        return probes.read, probes.multiply


class CPULayerKernels(CPUKernels):
    """Kernels for whole layers too, of a prompt two with the KV cache and attention between them.

    XLA computes a layer as some thirty operations, and converts weights that are not float32 in memory before it
    multiplies with them.
    """

    def embed(self, tokens: Int[Array, "B T"], weights: Weights) -> Float[Array, "B T D"]:
        """``model.embed`` in float32, the kernels' own type: nothing is rounded between layers.

        Not before mixtures of experts, which XLA computes, in the type of the weights.
        """
        x = super().embed(tokens, weights)
        mixtures = any(not isinstance(layer.ffw, MLPLayer) for layer in weights.layers)
        return x if mixtures else x.astype(jnp.float32)

    def layer(
        self, x: Float[Array, "B T D"], layer: Layer, number: int, cache: KVCache, call: model.Call
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """``model.apply_layer``. Sums are in float32 for every type of ``x``."""
        if isinstance(layer.attn, DeltaNetLayer):
            x, cache = delta_net_calls.apply_layer(x, layer, number, cache, call)
        else:
            x, cache = layer_calls.apply_layer(x, layer, number, cache, call)
        if isinstance(layer.ffw, MLPLayer):
            return x, cache
        if layer.ffw.shared is None:
            return x + model.feed_forward(x, layer, number, call), cache
        from jllm_core.backends.cpu.shared_expert import shared_expert, without_shared

        routed = model.feed_forward(x, without_shared(layer, layer.ffw), number, call)
        return (x + routed + shared_expert(x, layer, call)).astype(x.dtype), cache


def supports_layers(weights: Weights, config: ModelConfig) -> bool:
    """Whether ``CPULayerKernels`` takes every layer: its maths, heads of whole vectors, matrices of a known type."""
    if not (layer_calls.heads_fit(config) and delta_net_calls.nets_fit(config)):
        return False
    return all(is_known(matrix) for layer in weights.layers for matrix in _matrices(layer))


def supports_type(dtype: Any) -> bool:
    """Whether kernels read norms, embeddings and activations of this type."""
    return jnp.dtype(dtype).name in PLAIN_TYPES


def norm(
    x: Float[Array, "*rows D"], gamma: Float[Array, " D"], eps: float, centered: bool = False
) -> Float[Array, "*rows D"]:
    """``ops.norm.rms_norm`` by a kernel."""
    from jllm_core.backends.cpu.embedding_and_head import Norm
    from jllm_core.backends.cpu.kernel_building_blocks import Gamma

    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    (y,) = ffi.call(
        Norm(Gamma(gamma.dtype.name, centered)), {"x": rows, "gamma": gamma}, [rows.shape], eps=np.float32(eps)
    )
    return y.reshape(x.shape).astype(x.dtype)


def head(x: Float[Array, "*rows D"], w: Any, transposed: bool) -> Float[Array, "*rows V"]:
    """The logits, in float32, by ``w [D, V]`` or by a tied embedding ``[V, D]``, by a kernel."""
    from jllm_core.backends.cpu.embedding_and_head import Head

    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    matrix, operands = as_matrix("w", w)
    outs = w.shape[0] if transposed else w.shape[1]
    (y,) = ffi.call(Head(matrix, transposed), {"x": rows, **operands}, [(rows.shape[0], outs)])
    return y.reshape(*x.shape[:-1], outs)


def _matrices(layer: Layer) -> list[Any]:
    attn, ffw = layer.attn, layer.ffw
    matrices = [attn.q, attn.k, attn.v, attn.o]
    if isinstance(attn, DeltaNetLayer):
        matrices += [attn.z, attn.a, attn.b, attn.conv_q, attn.conv_k, attn.conv_v]
    elif attn.gate is not None:
        matrices.append(attn.gate)
    dense = ffw if isinstance(ffw, MLPLayer) else ffw.shared
    return matrices if dense is None else [*matrices, dense.w_gate, dense.w_up, dense.w_down]


def _pick(noisy: bool, **operands: Array) -> Int[Array, " B"]:
    from jllm_core.backends.cpu.sampling_kernels import TOKENS_PER_TASK, Pick

    rows, count = operands["logits"].shape
    tokens = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return ffi.call(Pick(noisy), operands, [tokens, (rows, -(-count // TOKENS_PER_TASK), 2)])[0]
