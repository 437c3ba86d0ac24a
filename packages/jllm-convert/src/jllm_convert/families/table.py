"""Family table rows: matching rules of tensors, and features of a family."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jllm_core.config import Mixer

from jllm_convert.families.tensor_layout import Identity, Layout
from jllm_convert.families.tensor_parts import Arrangement


@dataclass(frozen=True)
class Rule:
    """Matching rule: an array of the model, and its tensor's name and layout in each kind of source.

    ``{i}`` stands for the layer's number, ``{e}`` for an expert's: the array then has a tensor for each index of its
    first axis. Where publishers store an array in different ways, there is a rule for each; a source follows one.

    Attributes:
        array: dotted name in the Weights tree.
        hf: tensor name in Hugging Face files; None where the rule is not for them.
        gguf: tensor name in GGUF files; None where the rule is not for them.
        layout: the tensor's layout in Hugging Face files, or which parts of it are the array's.
        gguf_layout: the same in GGUF files, where that differs.
        mixer: what the layers that the rule is for mix their tokens with; None is all layers.
    """

    array: str
    hf: str | None
    gguf: str | None
    layout: Layout | Arrangement
    gguf_layout: Layout | Arrangement | None = None
    mixer: Mixer | None = None

    def name_in(self, naming: str) -> str | None:
        """The tensor's name in a source with this naming: ``"hf"``, ``"gguf"``, or ``"jllm"`` for a checkpoint."""
        return {"hf": self.hf, "gguf": self.gguf, "jllm": self.array}[naming]

    def layout_in(self, naming: str) -> Layout | Arrangement:
        """The tensor's layout in a source with this naming."""
        if naming == "jllm":
            return Identity()
        return self.gguf_layout if naming == "gguf" and self.gguf_layout is not None else self.layout


@dataclass(frozen=True)
class LeftOut:
    """Tensors that a family's files hold and that its text model has no use for. They are counted in reports.

    Attributes:
        what: what they are, in the plural.
        pattern: a regular expression for all of a name, in Hugging Face files.
    """

    what: str
    pattern: str


CACHE_SCALES = LeftOut("scales of a cache in 8 bits", r".*\.[kv]_scale")
"""Other programs may keep keys and values in 8 bits; these are for them, and not of the weights."""


@dataclass(frozen=True)
class SlidingWindows:
    """Sliding windows of a family, by config.json.

    Attributes:
        layers: the layers with a window: ``all``, the ``last`` ones from max_window_layers on, or those without RoPE
            (``unrotated``).
        switch: whether use_sliding_window turns windows on; else sliding_window alone does.
    """

    layers: Literal["all", "last", "unrotated"]
    switch: bool = True


@dataclass(frozen=True)
class Family:
    """Features of a model family. Code branches on these, never on the family's name.

    Attributes:
        model_type: the ``model_type`` of its config.json.
        gguf_architecture: the ``general.architecture`` of its GGUF files; None where it has none of its own.
        rules: a rule for every array that a model of the family may have.
        defaults: the values of config.json's fields where it leaves them out: those of the family's configuration class
            in transformers.
        buffer_suffixes: endings of the names of computed buffers, which are ignored.
        left_out: tensors that are left out, and counted aloud.
        text_model_type: the ``model_type`` of the text model where config.json may hold it in ``text_config``, beside
            other parts such as a vision encoder, and of folders that hold the text model alone; None where there is
            no such thing.
        outer_fields: fields that count where they stand around ``text_config``, and not in it.
        exported_as: the family that its checkpoints are exported as, where its own cannot be a text model alone.
        qk_norm: whether the heads of q and k have an RMSNorm.
        attention_bias: biases of the projections: on all four if config.json's attention_bias is true (``config``),
            always on q, k and v (``qkv``), or never (``none``).
        mlp_bias: whether config.json's ``mlp_bias`` is honoured (else the family has no such bias).
        moe: whether layers may be mixtures of experts.
        normalizes: whether the weights of a token's experts sum to one: as ``norm_topk_prob`` says, or always.
        gguf_normalizes: whether llama.cpp scales them so in this architecture, whatever the file says.
        shared_expert: whether mixtures have an expert that all tokens go through, with a gate.
        delta_nets: whether layers may be gated delta nets (``layer_types``, the ``linear_`` fields).
        output_gate: whether attention has an output gate.
        centered_norm: whether norms multiply by ``1 + gamma``.
        windows: the sliding windows; None where the family has none.
        skips_rope: whether config.json names layers without RoPE (no_rope_layers).
        default_head_dim: head_dim where config.json has none; None derives it from hidden_size and heads.
        default_rope_theta: the base of the rotary frequencies where config.json has none.
        rotary_factor: how much of a head is rotated where config.json has no ``partial_rotary_factor``; None is all of
            it, whatever it says.
        rope_fields: further fields of ``rope_parameters`` that change nothing.
        fields: further config.json fields of this family that change nothing.
    """

    model_type: str
    gguf_architecture: str | None
    rules: tuple[Rule, ...]
    defaults: Mapping[str, Any]
    # inv_freq: a buffer that old versions of transformers saved with the weights.
    # rope_freqs.weight: in GGUF files the factors of the rotary frequencies are a tensor; the config reader reads it.
    buffer_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq", "rope_freqs.weight")
    left_out: tuple[LeftOut, ...] = (CACHE_SCALES,)
    text_model_type: str | None = None
    outer_fields: tuple[str, ...] = ()
    exported_as: str | None = None
    qk_norm: bool = False
    attention_bias: Literal["config", "qkv", "none"] = "config"
    mlp_bias: bool = False
    moe: bool = False
    normalizes: Literal["config", "always"] = "config"
    gguf_normalizes: bool = True
    shared_expert: bool = False
    delta_nets: bool = False
    output_gate: bool = False
    centered_norm: bool = False
    windows: SlidingWindows | None = None
    skips_rope: bool = False
    default_head_dim: int | None = None
    default_rope_theta: float = 10000.0
    rotary_factor: float | None = None
    rope_fields: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()

    def field(self, fields: Mapping[str, Any], name: str) -> Any:
        """A field of config.json, or the family's default where it is left out."""
        return fields[name] if name in fields else self.defaults.get(name)
