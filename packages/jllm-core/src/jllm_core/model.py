"""The whole model: tokens to logits."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jllm_core.backends.attention_choice import attend
from jllm_core.backends.cpu import layer as cpu_layer
from jllm_core.config import ModelConfig
from jllm_core.kv_cache import Cache, KVCache, NoCache
from jllm_core.ops.linear import linear
from jllm_core.ops.mlp import mlp
from jllm_core.ops.moe import moe
from jllm_core.ops.norm import rms_norm
from jllm_core.ops.rope import apply_rope, rope_angles
from jllm_core.quantization.arrays import QuantizedArray, rows
from jllm_core.sharding import Placement
from jllm_core.weights import AttentionLayer, Layer, Leaf, MLPLayer, Weights


def forward(
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    weights: Weights,
    config: ModelConfig,
    cache: KVCache | None = None,
    placement: Placement | None = None,
    lengths: Int[Array, " B"] | Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T V"], KVCache]:
    """The logits of the token after each given one.

    Without a cache this is the plain causal model, differentiable, for scoring and training. With one it goes on
    where the cache stands: a whole prompt, a piece of it, or one token a call.

    Reference: the ``LlamaForCausalLM`` and ``Qwen3ForCausalLM`` of transformers.

    Args:
        tokens: token ids.
        positions: where in its text each token stands, from 0.
        weights: the model's arrays.
        config: the architecture that the weights were made for.
        cache: keys and values of earlier tokens, or None.
        placement: the mesh that the weights live on; None leaves the layout of what is computed to XLA.
        lengths: tokens in each row's whole text, where it comes in pieces, or in what each token is the end of;
            dynamic rope scaling goes by it.

    Returns:
        The logits in float32, and the cache with the new tokens' keys and values.
    """
    x, filled = hidden_states(
        tokens, positions, weights, config, NoCache() if cache is None else cache, placement, lengths
    )
    # Without a cache gradients may be asked for, which kernels have not.
    return unembed(x, weights, None if cache is None else placement), filled


def hidden_states(
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    weights: Weights,
    config: ModelConfig,
    cache: Cache,
    placement: Placement | None = None,
    lengths: Int[Array, " B"] | Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Cache]:
    """``forward`` up to the output head: the normalised last hidden state of each token, and the cache."""
    rotation = rope_angles(positions, config, lengths)
    # Bits have no gradients; without a cache, they may be asked for.
    trained = isinstance(cache, NoCache)
    x = _between_layers(embed(tokens, weights, None if trained else placement), placement)
    dtype = x.dtype
    if all(cpu_layer.supports(x, layer, config, cache, placement) for layer in weights.layers) and config.moe is None:
        x = x.astype(jnp.float32)  # the kernels' own type: nothing is rounded between layers
    for number, layer in enumerate(weights.layers):
        x, cache = block(x, layer, config, rotation, positions, cache, number, placement)
    if not trained and cpu_layer.runs_here(x.dtype, placement):
        # The order of XLA's sums goes by the number of rows.
        return cpu_layer.norm(x, weights.gamma_final, config.rms_norm_eps).astype(dtype), cache
    return rms_norm(x, weights.gamma_final, config.rms_norm_eps), cache


def block(
    x: Float[Array, "B T D"],
    layer: Layer,
    config: ModelConfig,
    rotation: tuple[Array, Array],
    positions: Int[Array, "B T"],
    cache: Cache,
    number: int,
    placement: Placement | None = None,
) -> tuple[Float[Array, "B T D"], Cache]:
    """One layer: attention, then the feed-forward part, each added to what came in; ``number`` counts from 0."""
    if cpu_layer.supports(x, layer, config, cache, placement):
        x, cache = cpu_layer.block(x, layer, config, rotation, positions, cache, number, placement)
        return x if isinstance(layer.ffw, MLPLayer) else x + feed_forward(x, layer, config, placement), cache
    normed = rms_norm(x, layer.attn_pre_gamma, config.rms_norm_eps)
    attended, cache = self_attention(normed, layer.attn, config, rotation, positions, cache, number, placement)
    x = _between_layers(x + attended, placement)
    return _between_layers(x + feed_forward(x, layer, config, placement), placement), cache


def _between_layers(x: Float[Array, "B T D"], placement: Placement | None) -> Float[Array, "B T D"]:
    """The residual stream where the rules want it: said once here, XLA need not guess it for every product."""
    return x if placement is None else placement.constrain(x, "batch", "tokens", None)


def feed_forward(
    x: Float[Array, "B T D"], layer: Layer, config: ModelConfig, placement: Placement | None = None
) -> Float[Array, "B T D"]:
    """The layer's RMSNorm and then its dense part or its mixture of experts."""
    x = rms_norm(x, layer.attn_post_gamma, config.rms_norm_eps)
    if isinstance(layer.ffw, MLPLayer):
        return mlp(x, layer.ffw)
    if config.moe is None:
        raise ValueError("the weights have a mixture of experts, the config says nothing of one")
    return moe(x, layer.ffw, config.moe, placement)


def self_attention(
    x: Float[Array, "B T D"],
    w: AttentionLayer,
    config: ModelConfig,
    rotation: tuple[Array, Array],
    positions: Int[Array, "B T"],
    cache: Cache,
    number: int,
    placement: Placement | None = None,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Project, rotate, remember, attend, project back; ``number`` is the layer's place in the cache."""
    q = linear("BTD,DNH->BTNH", x, w.q, w.q_bias)
    k = linear("BTD,DKH->BTKH", x, w.k, w.k_bias)
    v = linear("BTD,DKH->BTKH", x, w.v, w.v_bias)
    if w.q_gamma is not None and w.k_gamma is not None:
        q = rms_norm(q, w.q_gamma, config.rms_norm_eps)
        k = rms_norm(k, w.k_gamma, config.rms_norm_eps)
    if config.rotates(number):
        q, k = apply_rope(q, rotation), apply_rope(k, rotation)
    if placement is not None and (copies := placement.kv_copies(config.num_heads, config.num_kv_heads)) > 1:
        k, v = jnp.repeat(k, copies, axis=2), jnp.repeat(v, copies, axis=2)
    cache, keys, values, key_positions = cache.append(number, k, v, positions)
    attended = attend(q, keys, values, positions, key_positions, config.window(number), placement)
    return linear("BTNH,NHD->BTD", attended, w.o, w.o_bias), cache


def embed(tokens: Int[Array, "B T"], weights: Weights, placement: Placement | None = None) -> Float[Array, "B T D"]:
    """The rows of the embedding that the tokens name, in the type that the model computes in."""
    if isinstance(weights.embedding, QuantizedArray):
        return rows(weights.embedding, tokens, weights.dtype)
    return cpu_layer.take_rows(weights.embedding, tokens, placement)


def unembed(x: Float[Array, "... D"], weights: Weights, placement: Placement | None = None) -> Float[Array, "... V"]:
    """The logits, in float32, of normalised hidden states, by the output head or the tied embedding."""
    tied = weights.lm_head is None
    w: Leaf = weights.embedding if tied else weights.lm_head
    if cpu_layer.supports_head(x, w, placement):
        return cpu_layer.head(x, w, transposed=tied)
    logits = linear("...D,VD->...V" if tied else "...D,DV->...V", x, w)
    return logits.astype(jnp.float32)
