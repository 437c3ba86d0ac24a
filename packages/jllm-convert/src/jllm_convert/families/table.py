"""The kinds of row that the family tables are made of."""

from dataclasses import dataclass
from typing import Literal

from jllm_convert.matching.layout import Layout, Same


@dataclass(frozen=True)
class Rule:
    """One array of the model and the tensor that it comes from, by the name it has in each kind of source.

    ``{i}`` stands for the layer's number, ``{e}`` for an expert's: the array then has a tensor for each entry of its
    first axis. Where publishers store an array in different ways, there is a rule for each; a source follows one.

    Attributes:
        array: dotted name in the Weights tree.
        hf: tensor name in Hugging Face files; None where this way is not theirs.
        gguf: tensor name in GGUF files; None where this way is not theirs.
        layout: how Hugging Face stores it.
        gguf_layout: how GGUF stores it, where that differs.
    """

    array: str
    hf: str | None
    gguf: str | None
    layout: Layout
    gguf_layout: Layout | None = None

    def name_in(self, naming: str) -> str | None:
        """The tensor's name in a source of that naming: ``"hf"``, ``"gguf"``, or ``"jllm"`` for a checkpoint."""
        return {"hf": self.hf, "gguf": self.gguf, "jllm": self.array}[naming]

    def layout_in(self, naming: str) -> Layout:
        """The tensor's layout in a source of that naming."""
        if naming == "jllm":
            return Same()
        return self.gguf_layout if naming == "gguf" and self.gguf_layout is not None else self.layout


@dataclass(frozen=True)
class SlidingWindows:
    """How config.json says which layers have a sliding window.

    Attributes:
        layers: ``all`` of them, the ``last`` ones from max_window_layers on, or those that are ``unrotated``.
        switch: whether use_sliding_window turns it on; without the switch, sliding_window alone does.
        default: the window where config.json states none.
    """

    layers: Literal["all", "last", "unrotated"]
    switch: bool = True
    default: int | None = 4096


@dataclass(frozen=True)
class Family:
    """What sets one family apart. Code branches on these features, never on the family's name.

    Attributes:
        model_type: the ``model_type`` of its config.json.
        gguf_architecture: the ``general.architecture`` of its GGUF files; None where another family stands for it.
        rules: every array that a model of the family may have.
        derived: endings of tensor names that hold nothing of their own (computed buffers) and are left out.
        qk_norm: whether q and k are normalised.
        attention_bias: on all four projections if config.json's attention_bias says so (``config``), always on q, k and
            v (``qkv``), or never (``none``).
        mlp_bias: whether config.json's ``mlp_bias`` is honoured (else the family has no such bias).
        moe: whether layers may be mixtures of experts.
        windows: how layers get a sliding window; None where the family has none.
        skips_rope: whether config.json says which layers are not rotated (no_rope_layers).
        default_head_dim: head_dim where config.json has none; None derives it from hidden_size and heads.
        default_rope_theta: the base of the rotary frequencies where config.json has none.
        fields: further config.json fields of this family that change nothing.
    """

    model_type: str
    gguf_architecture: str | None
    rules: tuple[Rule, ...]
    # In a GGUF the factors of the rotary frequencies are a tensor; the config reader takes them up.
    derived: tuple[str, ...] = ("rotary_emb.inv_freq", "rope_freqs.weight")
    qk_norm: bool = False
    attention_bias: Literal["config", "qkv", "none"] = "config"
    mlp_bias: bool = False
    moe: bool = False
    windows: SlidingWindows | None = None
    skips_rope: bool = False
    default_head_dim: int | None = None
    default_rope_theta: float = 10000.0
    fields: tuple[str, ...] = ()
