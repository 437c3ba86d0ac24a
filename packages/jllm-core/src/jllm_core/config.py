"""ModelConfig: a model's architecture, in one normalised spelling for all families, and its JSON."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Literal, TypeGuard

from jllm_core.errors import JLLMError

MAX_LAYERS = 10_000
"""Layers of a model, far more than any has. A config is a file that somebody else wrote, and its number of layers is
what is allocated."""
MAX_EXPERTS = 100_000
"""Experts of a model, all layers together, for the same reason."""

RopeKind = Literal["linear", "dynamic", "llama3", "yarn", "factors"]
Mixer = Literal["attention", "delta_net"]
"""A layer's part in which tokens see each other: softmax attention, or a gated delta net."""


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of JSON is a finite number: Python takes true for an int, and reads Infinity and 1e400."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return bool(abs(value) <= sys.float_info.max)  # numpy's numbers would give numpy's own bool


class ConfigError(JLLMError):
    """A ModelConfig that describes no possible model, or JSON that is no ModelConfig."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of the rotary frequencies, for contexts longer than those of the first training.

    Attributes:
        kind: ``linear`` divides every frequency by ``factor`` (position interpolation, arXiv:2306.15595);
            ``dynamic`` raises the base with the length of the text, once it exceeds the first training's (NTK-aware
            scaling, arXiv:2309.00071, section 3.3);
            ``llama3`` divides slow frequencies, keeps fast ones and blends in between (Llama 3.1);
            ``yarn`` does so by the number of rotations within the first training's context, and scales the attention
            (YaRN, arXiv:2309.00071);
            ``factors`` divides each frequency by a number of its own (the form of ``llama3`` in GGUF files).
        factor: the divisor; for ``dynamic`` how fast the base grows.
        low_freq_factor, high_freq_factor: the band in which ``llama3`` blends.
        beta_fast, beta_slow: the band in which ``yarn`` blends, in rotations.
        truncate: whether the ends of that band are rounded to whole features (``yarn``).
        attention_factor: factor of all cosines and sines (``yarn``).
        original_context_length: tokens of context in the first training (all kinds but ``linear`` and ``factors``).
        factors: a divisor for each pair of rotated features (``factors``).

    Raises:
        ConfigError: an unknown kind, or a value that the kind needs and that is missing or impossible.
    """

    kind: RopeKind
    factor: float | int = 1.0
    low_freq_factor: float | int | None = None
    high_freq_factor: float | int | None = None
    beta_fast: float | int = 32
    beta_slow: float | int = 1
    truncate: bool = True
    attention_factor: float | int = 1.0
    original_context_length: int | None = None
    factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        # Here and below, not at the top: who reads what a model is need not read what is refused.
        from jllm_core.config_checks import check_rope_scaling

        check_rope_scaling(self)


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts in place of the feed-forward layer (Shazeer et al., arXiv:1701.06538).

    Attributes:
        num_experts: experts in a layer [E].
        experts_per_token: experts that each token goes to (top-k).
        intermediate_size: width of one expert [F].
        normalize_weights: whether the weights of a token's experts are scaled to sum to one (``norm_topk_prob``).
        layers: for each layer, whether it is a mixture of experts; None is all of them.
        shared_size: width of an expert besides, which every token goes through (DeepSeekMoE, arXiv:2401.06066); None
            where there is none.
        shared_gate: whether what the shared expert gives is multiplied by a sigmoid of the token (Qwen1.5-MoE).

    Raises:
        ConfigError: an impossible value.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    normalize_weights: bool = True
    layers: tuple[bool, ...] | None = None
    shared_size: int | None = None
    shared_gate: bool = False

    def __post_init__(self) -> None:
        from jllm_core.config_checks import check_moe

        check_moe(self)


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig:
    """Gated delta nets in place of attention (Yang et al., arXiv:2412.06464).

    Attributes:
        num_key_heads: heads of the queries and keys [Hk].
        num_value_heads: heads of the values, each with a state of its own [Hv]; a multiple of ``num_key_heads``.
        key_head_dim: width of a query or key head [dk].
        value_head_dim: width of a value head [dv].
        conv_size: tokens that the convolution over q, k and v sees, the present one included [W].

    Raises:
        ConfigError: an impossible value.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_size: int = 4

    def __post_init__(self) -> None:
        from jllm_core.config_checks import check_delta_net

        check_delta_net(self)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a model: what it computes, and nothing of how it is stored, placed or sampled.

    The letters in brackets are those of docs/notation.md.

    Attributes:
        model_type: the publisher's name of the family (``llama``, ``qwen3``); a label that no code branches on.
        vocab_size: number of token ids [V].
        hidden_size: width of the residual stream [D].
        intermediate_size: width of the feed-forward layer [F].
        num_layers: number of layers.
        num_heads: number of query heads [N].
        num_kv_heads: number of key and value heads [K]; divides ``num_heads``.
        head_dim: width of a head [H]; even, and not always ``hidden_size / num_heads``.
        context_length: tokens, prompt and answer together, that the model is meant for at most.
        rms_norm_eps: the epsilon of every RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: scaling of the rotary frequencies, or None.
        tie_embeddings: whether the output head is the transposed embedding; ``Weights.lm_head`` is None then.
        qkv_bias, o_bias, mlp_bias: whether these projections add a bias.
        qk_norm: whether each head of q and k goes through RMSNorm before the rotation (Qwen3).
        moe: the mixture of experts; None if every layer has a plain feed-forward layer.
        windows: for each layer the sliding window, the positions that a query sees, its own included, or None for all;
            None in place of the tuple is None for every layer.
        rope_layers: for each layer, whether q and k are rotated (SmolLM3 leaves some out); None is all of them.
        rotary_dim: how many features of a head, the first ones, are rotated; None is all of them.
        output_gate: whether what attention gives is multiplied by a sigmoid of the token (Qwen3-Next).
        centered_norm: whether norms multiply by ``1 + gamma``, in float32 and before they round (Qwen3-Next), rather
            than by ``gamma`` after it; those of delta nets do not.
        mixers: for each layer, what mixes its tokens; None is attention in all of them.
        delta_net: the shape of the layers with a delta net; None if there are none.

    Raises:
        ConfigError: an impossible value, or values that do not fit each other.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rms_norm_eps: float | int = 1e-6
    rope_theta: float | int = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    moe: MoEConfig | None = None
    windows: tuple[int | None, ...] | None = None
    rope_layers: tuple[bool, ...] | None = None
    rotary_dim: int | None = None
    output_gate: bool = False
    centered_norm: bool = False
    mixers: tuple[Mixer, ...] | None = None
    delta_net: DeltaNetConfig | None = None

    def __post_init__(self) -> None:
        from jllm_core.config_checks import check_model

        check_model(self)

    @property
    def rotated_features(self) -> int:
        """How many features of a head are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def mixer(self, layer: int) -> Mixer:
        """What mixes the tokens of this layer."""
        return "attention" if self.mixers is None else self.mixers[layer]

    def layers_with(self, mixer: Mixer) -> tuple[int, ...]:
        """The numbers of the layers whose tokens this mixes."""
        return tuple(layer for layer in range(self.num_layers) if self.mixer(layer) == mixer)

    @property
    def kv_arrays(self) -> int:
        """The number of arrays that a cache has besides states: keys and values of each layer with attention."""
        return 2 * len(self.layers_with("attention"))

    def is_moe(self, layer: int) -> bool:
        """Whether this layer's feed-forward part is a mixture of experts."""
        return self.moe is not None and (self.moe.layers is None or self.moe.layers[layer])

    def window(self, layer: int) -> int | None:
        """The sliding window of this layer: positions that a query sees, its own included; None for all before it."""
        return None if self.windows is None else self.windows[layer]

    def rotates(self, layer: int) -> bool:
        """Whether this layer rotates q and k."""
        return self.rope_layers is None or self.rope_layers[layer]

    def to_json(self) -> str:
        """The config as JSON; ``from_json`` gives back an equal config."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """Read a config from the JSON of ``to_json``.

        Raises:
            ConfigError: not JSON, an unknown or missing field, or an impossible value.
        """
        from jllm_core.config_json import read_config

        return read_config(text)
