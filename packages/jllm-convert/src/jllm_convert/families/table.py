"""The kinds of row that the family tables are made of."""

from dataclasses import dataclass

from jllm_convert.layout import Layout


@dataclass(frozen=True)
class Rule:
    """One array of the model and its name in each kind of source; ``{i}`` stands for the layer's number.

    Attributes:
        array: dotted name in the Weights tree.
        hf: tensor name in Hugging Face files.
        gguf: tensor name in GGUF files.
        layout: how Hugging Face stores it.
        gguf_layout: how GGUF stores it, where that differs.
    """

    array: str
    hf: str
    gguf: str
    layout: Layout
    gguf_layout: Layout | None = None

    def name_in(self, naming: str) -> str:
        """The tensor's name in a source of that naming, ``"hf"`` or ``"gguf"``."""
        return self.hf if naming == "hf" else self.gguf

    def layout_in(self, naming: str) -> Layout:
        """The tensor's layout in a source of that naming."""
        return self.gguf_layout if naming == "gguf" and self.gguf_layout is not None else self.layout


@dataclass(frozen=True)
class Family:
    """What sets one family apart. Code branches on these features, never on the family's name.

    Attributes:
        model_type: the ``model_type`` of its config.json.
        gguf_architecture: the ``general.architecture`` of its GGUF files.
        rules: every array that a model of the family may have.
        derived: endings of tensor names that hold nothing of their own (computed buffers) and are left out.
        qk_norm: whether q and k are normalised.
        mlp_bias: whether config.json's ``mlp_bias`` is honoured (else the family has no such bias).
        default_head_dim: head_dim where config.json has none; None derives it from hidden_size and heads.
        fields: config.json fields of this family alone that the config reader handles.
    """

    model_type: str
    gguf_architecture: str
    rules: tuple[Rule, ...]
    # In a GGUF the factors of the rotary frequencies are a tensor; the config reader takes them up.
    derived: tuple[str, ...] = ("rotary_emb.inv_freq", "rope_freqs.weight")
    qk_norm: bool = False
    mlp_bias: bool = False
    default_head_dim: int | None = None
    fields: tuple[str, ...] = ()
