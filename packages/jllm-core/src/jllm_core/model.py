"""Decoder-only transformer: tokens to logits.

The forward pass stands here once: embed, layers of attention and feed-forward, last norm, output head. The shapes'
letters are those of docs/notation.md. A ``Backend`` may compute a part in its own way; it is then named here as
``backend.PART or part``.
"""

from dataclasses import dataclass, field
from typing import overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jllm_core.backends.base import XLA, Backend
from jllm_core.config import ModelConfig
from jllm_core.kv_cache import Cache, KVCache, NoCache
from jllm_core.ops.attention import attention, attention_probabilities
from jllm_core.ops.linear import Matrix, linear
from jllm_core.ops.mlp import mlp
from jllm_core.ops.moe import Routing, moe, route
from jllm_core.ops.norm import rms_norm
from jllm_core.ops.rope import apply_rope, rope_angles
from jllm_core.sharding import Placement
from jllm_core.weights import AttentionLayer, DeltaNetLayer, Layer, Leaf, MLPLayer, ShortRepr, Weights


@dataclass(frozen=True)
class Capture:
    """What a forward pass gives beside its logits. Layers count from 0.

    Attributes:
        hidden: the layers after which the residual stream is kept.
        attention: the layers whose attention probabilities are kept.
        routing: whether the router choices of every mixture of experts are kept.
    """

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    routing: bool = False


@jax.tree_util.register_dataclass
@dataclass(repr=False)
class Captured(ShortRepr):
    """What was captured, by the number of the layer.

    Attributes:
        hidden: the residual stream after the layer, ``[B, T, D]``.
        attention: attention probabilities, float32 ``[B, N, T, S]``: from each query to each slot of the cache, or
            without a cache to each token (S = T).
        routing: the router's choices for the ``R = B * T`` tokens.
    """

    hidden: dict[int, Array] = field(default_factory=dict)
    attention: dict[int, Array] = field(default_factory=dict)
    routing: dict[int, Routing] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """What all layers of one forward pass share.

    Attributes:
        config: the architecture.
        positions: where in its text each token stands, int ``[B, T]``.
        rotation: cosines and sines of the positions (``rope_angles``).
        backend: where it runs.
        capture: what to keep.
        captured: what has been kept so far. Filled while the pass is traced, in the order of the layers.
    """

    config: ModelConfig
    positions: Array
    rotation: tuple[Array, Array]
    backend: Backend
    capture: Capture = Capture()
    captured: Captured = field(default_factory=Captured)


@overload
def forward(
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    weights: Weights,
    config: ModelConfig,
    cache: KVCache | None = None,
    placement: Placement | None = None,
    lengths: Int[Array, " B"] | Int[Array, "B T"] | None = None,
    *,
    backend: Backend | None = None,
    capture: None = None,
) -> tuple[Float[Array, "B T V"], KVCache]: ...


@overload
def forward(
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    weights: Weights,
    config: ModelConfig,
    cache: KVCache | None = None,
    placement: Placement | None = None,
    lengths: Int[Array, " B"] | Int[Array, "B T"] | None = None,
    *,
    backend: Backend | None = None,
    capture: Capture,
) -> tuple[Float[Array, "B T V"], KVCache, Captured]: ...


def forward(
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    weights: Weights,
    config: ModelConfig,
    cache: KVCache | None = None,
    placement: Placement | None = None,
    lengths: Int[Array, " B"] | Int[Array, "B T"] | None = None,
    *,
    backend: Backend | None = None,
    capture: Capture | None = None,
) -> tuple[Float[Array, "B T V"], KVCache] | tuple[Float[Array, "B T V"], KVCache, Captured]:
    """The logits of the token after each given one.

    Without a cache this is the plain causal model, for scoring and training. With one it goes on where the cache
    stands: a whole prompt, a piece of it, or one token a call. On XLA, the default, it is differentiable.

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
        backend: from ``backends.select``, in place of ``placement``; XLA on that placement when None.
        capture: what to give beside the logits.

    Returns:
        The logits in float32, and the cache with the new tokens' keys and values; with ``capture``, what was captured.

    Raises:
        ValueError: ``capture`` asks for a layer that there is not, or the backend computes layers as a whole.
    """
    backend = XLA(placement) if backend is None else backend
    captured = Captured()
    # NoCache is a cache like others, so that scoring and training run the same lines as decoding.
    x, filled = hidden_states(
        tokens, positions, weights, config, NoCache() if cache is None else cache, backend, lengths, capture, captured
    )
    logits = (backend.unembed or unembed)(x, weights)
    return (logits, filled) if capture is None else (logits, filled, captured)


def hidden_states(
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    weights: Weights,
    config: ModelConfig,
    cache: Cache,
    backend: Backend | None = None,
    lengths: Int[Array, " B"] | Int[Array, "B T"] | None = None,
    capture: Capture | None = None,
    captured: Captured | None = None,
) -> tuple[Float[Array, "B T D"], Cache]:
    """``forward`` up to the output head: the normalised last hidden state of each token, and the cache.

    What is not listed is as ``forward`` takes it.

    Args:
        captured: where to put what ``capture`` asks for.
    """
    backend = backend or XLA()
    if capture is not None:
        _check_capture(capture, config, backend)
    # Cosines and sines are the same in every layer: computed once, and not 80 times.
    rotation = rope_angles(positions, config, lengths)
    call = Call(config, positions, rotation, backend, capture or Capture(), captured or Captured())
    x = _between_layers((backend.embed or embed)(tokens, weights), backend)
    # A Python loop, not lax.scan: layers may differ (windows, experts, layers without rotation), and each array has a
    # name, a file and a sharding of its own.
    for number, layer in enumerate(weights.layers):
        with jax.named_scope(f"layer_{number}"):
            # The number is a Python int, so that what a layer does by its number is decided while it is traced.
            x, cache = (backend.layer or apply_layer)(x, layer, number, cache, call)
        if number in call.capture.hidden:
            call.captured.hidden[number] = x
    # Normalised here and not with the logits: embeddings of texts are these states too.
    return (backend.final_norm or final_norm)(x, weights, config), cache


def apply_layer(
    x: Float[Array, "B T D"], layer: Layer, number: int, cache: Cache, call: Call
) -> tuple[Float[Array, "B T D"], Cache]:
    """One layer: attention or a delta net, then the feed-forward part, each added to what came in; ``number`` counts
    from 0."""
    normed = _norm(x, layer.attn_pre_gamma, call.config)
    if isinstance(layer.attn, AttentionLayer):
        mixed, cache = self_attention(normed, layer.attn, number, cache, call)
    else:
        mixed, cache = recurrence(normed, layer.attn, number, cache, call)
    # Pre-norm residuals: what is added is normalised on the way in, the stream itself never is before the last layer.
    x = _between_layers(x + mixed, call.backend)
    return _between_layers(x + feed_forward(x, layer, number, call), call.backend), cache


def self_attention(
    x: Float[Array, "B T D"], w: AttentionLayer, number: int, cache: Cache, call: Call
) -> tuple[Float[Array, "B T D"], Cache]:
    """Project to q, k and v, rotate, append to the cache, attend, project back."""
    config, placement = call.config, call.backend.placement
    # B batch, T tokens, D width, N query heads, K kv heads, H features of a head.
    with jax.named_scope("qkv"):
        q = linear("BTD,DNH->BTNH", x, w.q, w.q_bias)
        k = linear("BTD,DKH->BTKH", x, w.k, w.k_bias)
        v = linear("BTD,DKH->BTKH", x, w.v, w.v_bias)
    # Qwen3: an RMSNorm over each head, before the rotation, which keeps the length of a vector.
    if w.q_gamma is not None and w.k_gamma is not None:
        q, k = _norm(q, w.q_gamma, config), _norm(k, w.k_gamma, config)
    # Keys are cached rotated: a token's own position never changes, so no step has to rotate them again.
    if config.rotates(number):
        q, k = apply_rope(q, call.rotation), apply_rope(k, call.rotation)
    # With more devices than kv heads, each device keeps the one kv head that its query heads attend to.
    if placement is not None and (copies := placement.kv_copies(config.num_heads, config.num_kv_heads)) > 1:
        k, v = jnp.repeat(k, copies, axis=2), jnp.repeat(v, copies, axis=2)
    with jax.named_scope("kv_cache"):
        cache, keys, values, key_positions = cache.append(number, k, v, call.positions)
    window = config.window(number)
    if number in call.capture.attention:
        # Computed a second time here, for attention itself gives only its result; XLA merges the two.
        grouped = attention_probabilities(q, keys, call.positions, key_positions, window)
        call.captured.attention[number] = grouped.reshape(len(q), -1, *grouped.shape[3:])
    with jax.named_scope("attention"):
        attended = (call.backend.attention or attention)(q, keys, values, call.positions, key_positions, window)
    if w.gate is not None:
        # Qwen3-Next: a token may take less of what it has read, feature by feature (arXiv:2505.06708).
        attended = attended * jax.nn.sigmoid(linear("BTD,DNH->BTNH", x, w.gate))
    with jax.named_scope("o"):
        return linear("BTNH,NHD->BTD", attended, w.o, w.o_bias), cache


@jax.named_scope("delta_net")
def recurrence(
    x: Float[Array, "B T D"], w: DeltaNetLayer, number: int, cache: Cache, call: Call
) -> tuple[Float[Array, "B T D"], Cache]:
    """A delta net that goes on from the state in the cache, and leaves its own there."""
    from jllm_core.ops.delta_net import delta_net  # only hybrids have a use for these two
    from jllm_core.recurrent_state import StateCache

    if not isinstance(cache, StateCache):
        raise ValueError(
            f"{type(cache).__name__} keeps keys and values alone, and layer {number} is a delta net, which has a "
            "state; give a cache with ``state`` and ``set_state`` (jllm_core.recurrent_state), or none"
        )
    y, state = delta_net(x, w, cache.state(number), cache.counts, call.config.rms_norm_eps)
    return y, cache.set_state(number, state)


def feed_forward(x: Float[Array, "B T D"], layer: Layer, number: int, call: Call) -> Float[Array, "B T D"]:
    """The layer's second RMSNorm, and then its dense part or its mixture of experts."""
    x = _norm(x, layer.attn_post_gamma, call.config)
    if isinstance(layer.ffw, MLPLayer):
        return mlp(x, layer.ffw)
    if call.config.moe is None:
        raise ValueError("the weights have a mixture of experts, the config says nothing of one")
    if call.capture.routing:
        # Routed a second time here, for over a mesh each device routes its own tokens; XLA merges the two elsewhere.
        rows = x.reshape(-1, x.shape[-1])
        call.captured.routing[number] = route(rows, layer.ffw.w_router, call.config.moe)
    return (call.backend.moe or moe)(x, layer.ffw, call.config.moe, call.backend)


@jax.named_scope("embed")
def embed(tokens: Int[Array, "B T"], weights: Weights) -> Float[Array, "B T D"]:
    """The rows of the embedding that the tokens name, in the type that the model computes in."""
    if isinstance(weights.embedding, Matrix):
        return weights.embedding.rows(tokens, weights.dtype)
    rows: Array = weights.embedding[tokens]
    return rows


@jax.named_scope("final_norm")
def final_norm(x: Float[Array, "B T D"], weights: Weights, config: ModelConfig) -> Float[Array, "B T D"]:
    """The RMSNorm behind the last layer."""
    return _norm(x, weights.gamma_final, config)


@jax.named_scope("unembed")
def unembed(x: Float[Array, "... D"], weights: Weights) -> Float[Array, "... V"]:
    """The logits, in float32, of normalised hidden states, by the output head or the tied embedding."""
    tied = weights.lm_head is None
    # A tied embedding is read as it lies, [V, D]: a transposed copy would be the largest array of a small model.
    w: Leaf = weights.embedding if tied else weights.lm_head
    # float32, for the softmax over the vocabulary takes differences of logits that bfloat16 cannot tell apart.
    return linear("...D,VD->...V" if tied else "...D,DV->...V", x, w).astype(jnp.float32)


def _norm(x: Float[Array, "*rows D"], gamma: Float[Array, " D"], config: ModelConfig) -> Float[Array, "*rows D"]:
    normed: Array = rms_norm(x, gamma, config.rms_norm_eps, config.centered_norm)
    return normed


def _between_layers(x: Float[Array, "B T D"], backend: Backend) -> Float[Array, "B T D"]:
    """The residual stream where the rules want it: said once here, XLA need not guess it for every product."""
    return x if backend.placement is None else backend.placement.constrain(x, "batch", "tokens", None)


def _check_capture(capture: Capture, config: ModelConfig, backend: Backend) -> None:
    if backend.layer is not None:
        raise ValueError(
            f"{type(backend).__name__} computes layers as a whole, and nothing inside them can be captured; "
            "name the backend XLA"
        )
    for number in (*capture.hidden, *capture.attention):
        if not 0 <= number < config.num_layers:
            raise ValueError(f"there is no layer {number} to capture: the model's are 0 to {config.num_layers - 1}")
    for number in capture.attention:
        if config.mixer(number) != "attention":
            raise ValueError(
                f"layer {number} is a delta net and has no attention to capture; "
                f"the layers that do are {', '.join(map(str, config.layers_with('attention'))) or 'none'}"
            )
