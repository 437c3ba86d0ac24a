"""ModelConfig: a model's architecture, in one normalised spelling for all families, and its JSON."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, get_args

from jllm_core.errors import JLLMError

MAX_LAYERS = 10_000
"""Layers of a model, far more than any has. A config is a file that somebody else wrote, and its number of layers is
what is allocated."""
MAX_EXPERTS = 100_000
"""Experts of a model, all layers together, for the same reason."""

RopeKind = Literal["linear", "dynamic", "llama3", "yarn", "factors"]


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
        factors: ``head_dim / 2`` divisors (``factors``).

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
        if self.kind not in get_args(RopeKind):
            raise ConfigError(
                f"rope scaling kind {self.kind!r} is not supported; known: {', '.join(get_args(RopeKind))}"
            )
        for name in ("factor", "beta_fast", "beta_slow", "attention_factor"):
            value = getattr(self, name)
            if not is_number(value) or not value > 0:
                raise ConfigError(f"rope scaling {name} must be a number above 0, got {value!r}")
        _need_bool("rope scaling truncate", self.truncate)
        if self.kind in ("dynamic", "llama3", "yarn"):
            _need_size(f"original_context_length of rope scaling {self.kind!r}", self.original_context_length)
        if self.kind == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            if not is_number(low) or not is_number(high):
                raise ConfigError(
                    "rope scaling 'llama3' needs the numbers low_freq_factor and high_freq_factor, "
                    f"got {low!r} and {high!r}"
                )
            if not 0 < low < high:
                raise ConfigError(
                    f"rope scaling 'llama3' needs 0 < low_freq_factor < high_freq_factor, got {low}, {high}"
                )
        if self.kind == "factors":
            factors = self.factors or ()
            if not factors or not all(is_number(factor) and factor > 0 for factor in factors):
                raise ConfigError("rope scaling 'factors' needs one divisor above 0 for each frequency")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts in place of the feed-forward layer (Shazeer et al., arXiv:1701.06538).

    Attributes:
        num_experts: experts in a layer [E].
        experts_per_token: experts that each token goes to (top-k).
        intermediate_size: width of one expert [F].
        normalize_weights: whether the weights of a token's experts are scaled to sum to one (``norm_topk_prob``).
        layers: for each layer, whether it is a mixture of experts; None is all of them.

    Raises:
        ConfigError: an impossible value.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    normalize_weights: bool = True
    layers: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("num_experts", "experts_per_token", "intermediate_size"):
            _need_size(name, getattr(self, name))
        _need_at_most("num_experts", self.num_experts, MAX_EXPERTS)
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"experts_per_token must be at most num_experts, got {self.experts_per_token} of {self.num_experts}"
            )
        _need_bool("normalize_weights", self.normalize_weights)


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

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "context_length"):
            _need_size(name, getattr(self, name))
        _need_at_most("num_layers", self.num_layers, MAX_LAYERS)
        # Each within its limit, their product could still be what nobody can allocate.
        if self.moe:
            _need_at_most("num_layers times num_experts", self.num_layers * self.moe.num_experts, MAX_EXPERTS)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        # Rotary embedding turns pairs of features.
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for the rotary embedding, got {self.head_dim}")
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if not is_number(value) or not value > 0:
                raise ConfigError(f"{name} must be a number above 0, got {value!r}")
        for name in ("tie_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm"):
            _need_bool(name, getattr(self, name))
        scaling = self.rope_scaling
        if scaling and scaling.factors and len(scaling.factors) != self.head_dim // 2:
            raise ConfigError(
                f"rope scaling has {len(scaling.factors)} factors, head_dim {self.head_dim} needs {self.head_dim // 2}"
            )

        # What is said for each layer must be said for every layer.
        per_layers: dict[str, Any] = {"windows": self.windows, "rope_layers": self.rope_layers}
        per_layers["moe.layers"] = self.moe.layers if self.moe else None
        for name, per_layer in per_layers.items():
            if per_layer is not None and len(per_layer) != self.num_layers:
                raise ConfigError(f"{name} must have an entry for each of {self.num_layers} layers, got {per_layer!r}")
        for window in self.windows or ():
            if window is not None:
                _need_size("each of windows", window)
        for name in ("moe.layers", "rope_layers"):
            for flag in per_layers[name] or ():
                _need_bool(f"each of {name}", flag)

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


def _need_size(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")


def _need_at_most(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise ConfigError(f"{name} must be at most {limit:,}, got {value:,}")


def _need_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}")
