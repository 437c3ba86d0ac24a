"""config.json as it is written: what it says is what the model was, or it is refused."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jllm_convert.errors import ConversionError
from jllm_convert.exporting.huggingface_config import _rotary_factor, to_hf_config
from jllm_convert.families import FAMILIES
from jllm_convert.sources.huggingface.config import read_hf_config
from jllm_convert.sources.huggingface.rope import read_rotary_dim
from jllm_core import ModelConfig, MoEConfig, RopeScaling
from jllm_core.ops.rope import rope_frequencies

TinyConfig = Callable[..., dict[str, Any]]

WINDOW = {"use_sliding_window": True, "sliding_window": 24}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_hidden_layers": 3}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-no-gqa": {"num_key_value_heads": 4},
    "llama-attention-bias": {"attention_bias": True},
    "llama-mlp-bias": {"mlp_bias": True},
    "llama3-rope": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "llama-linear-rope": {"rope_scaling": {"type": "linear", "factor": 4}},
    "llama-dynamic-rope": {"rope_scaling": {"type": "dynamic", "factor": 2.5}},
    "mistral": {"model_type": "mistral"},
    "mistral-window": {"model_type": "mistral", "sliding_window": 24},
    "mistral-no-window": {"model_type": "mistral", "sliding_window": None},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 9, "rope_theta": None},
    "smollm3-all-rotated": {"model_type": "smollm3", "no_rope_layers": [1, 1]},
    "smollm3-windows": {"model_type": "smollm3", "no_rope_layers": [1, 0], **WINDOW},
    "smollm3-biases": {"model_type": "smollm3", "attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-windows": {"model_type": "qwen2", "max_window_layers": 1, **WINDOW},
    "qwen2-windows-first": {"model_type": "qwen2", "layer_types": ["sliding_attention", "full_attention"], **WINDOW},
    "qwen3": {"model_type": "qwen3"},
    "qwen3-attention-bias": {"model_type": "qwen3", "attention_bias": True},
    "qwen3-yarn": {"model_type": "qwen3", "rope_scaling": YARN},
    "qwen3-yarn-stated": {
        "model_type": "qwen3",
        "rope_scaling": {**YARN, "attention_factor": 1.25, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    },
    "qwen3-yarn-weighed": {"model_type": "qwen3", "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "qwen3-moe": {"model_type": "qwen3_moe", "norm_topk_prob": True, **EXPERTS},
    "qwen3-moe-not-normalised": {"model_type": "qwen3_moe", **EXPERTS},
    "qwen3-moe-every-other": {"model_type": "qwen3_moe", "decoder_sparse_step": 2, **EXPERTS},
    "qwen3-moe-but-one": {"model_type": "qwen3_moe", "mlp_only_layers": [1], **EXPERTS},
    "qwen3-moe-windows": {"model_type": "qwen3_moe", **WINDOW, **EXPERTS},
    "qwen3-moe-without-experts": {"model_type": "qwen3_moe"},
}


def read(fields: dict[str, Any]) -> ModelConfig:
    return read_hf_config(json.loads(json.dumps(fields)), "config.json")


def problems_of(config: ModelConfig) -> tuple[str, ...]:
    with pytest.raises(ConversionError) as caught:
        to_hf_config(config, "float32")
    return caught.value.problems


@pytest.fixture
def tiny(tiny_config: TinyConfig) -> Callable[..., ModelConfig]:
    def make(**changes: Any) -> ModelConfig:
        return read(tiny_config(**changes))

    return make


# ---- What can be said


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_written_is_what_was_read(tiny: Callable[..., ModelConfig], name: str) -> None:
    config = tiny(**VARIANTS[name])
    assert read(to_hf_config(config, "bfloat16", (3,))) == config


def test_llama_is_spelled_as_published(tiny: Callable[..., ModelConfig]) -> None:
    assert to_hf_config(tiny(rope_scaling={"rope_type": "llama3", **LLAMA3}), "bfloat16", (3,)) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": 11,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": 3,
        "pad_token_id": None,
    }


def test_yarn_states_what_is_not_the_default_and_the_stretched_context(tiny: Callable[..., ModelConfig]) -> None:
    fields = to_hf_config(tiny(**VARIANTS["qwen3-yarn"]), "float32")
    assert (fields["rope_scaling"], fields["max_position_embeddings"]) == (YARN, 256)
    fields = to_hf_config(tiny(**VARIANTS["qwen3-yarn-stated"]), "float32")
    assert fields["rope_scaling"] == VARIANTS["qwen3-yarn-stated"]["rope_scaling"]


def test_dynamic_scaling_states_the_context_of_the_first_training(tiny: Callable[..., ModelConfig]) -> None:
    fields = to_hf_config(tiny(**VARIANTS["llama-dynamic-rope"]), "float32")
    assert fields["max_position_embeddings"] == 64
    assert fields["rope_scaling"] == {"rope_type": "dynamic", "factor": 2.5}


def test_fields_whose_default_would_be_another_model_are_written(tiny: Callable[..., ModelConfig]) -> None:
    """Each of these is something else in transformers when it is left out."""
    smollm3 = to_hf_config(tiny(model_type="smollm3", no_rope_layers=[1, 1], rope_theta=1e4), "float32")
    assert (smollm3["tie_word_embeddings"], smollm3["no_rope_layers"]) == (False, [1, 1])
    assert (smollm3["rope_theta"], smollm3["pad_token_id"]) == (1e4, None)
    assert to_hf_config(tiny(model_type="mistral", sliding_window=None), "float32")["sliding_window"] is None
    assert to_hf_config(tiny(model_type="qwen3_moe", num_experts=0), "float32")["num_experts"] == 0


def test_which_layers_are_mixtures(tiny: Callable[..., ModelConfig]) -> None:
    def written(*layers: bool) -> tuple[Any, Any]:
        moe = MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=8, layers=layers)
        fields = to_hf_config(replace(tiny(model_type="qwen3_moe", num_hidden_layers=4), moe=moe), "float32")
        return fields["decoder_sparse_step"], fields["mlp_only_layers"]

    assert written(True, True, True, True) == (1, [])
    assert written(False, True, False, True) == (2, [])
    assert written(False, False, True, False) == (3, [])
    assert written(True, False, True, True) == (1, [1])
    assert written(True, False, False, False) == (1, [1, 2, 3])


def test_windows_that_are_not_the_last_layers_are_listed(tiny: Callable[..., ModelConfig]) -> None:
    qwen2 = to_hf_config(tiny(**VARIANTS["qwen2-windows"]), "float32")
    assert qwen2["max_window_layers"] == 1
    assert qwen2["layer_types"] == ["full_attention", "sliding_attention"]
    # Before there were layer_types, transformers went by this field alone, with 28 as its default.
    assert to_hf_config(tiny(**VARIANTS["qwen3-moe-windows"]), "float32")["max_window_layers"] == 0
    assert to_hf_config(tiny(**VARIANTS["qwen3"]), "float32")["max_window_layers"] == 2


@pytest.mark.parametrize(("ids", "written"), [((), None), ((7,), 7), ((7, 9), [7, 9])])
def test_ids_of_special_tokens(tiny: Callable[..., ModelConfig], ids: tuple[int, ...], written: Any) -> None:
    fields = to_hf_config(tiny(), "float32", ids, bos_id=1, pad_id=2)
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["pad_token_id"]) == (1, written, 2)


def test_every_family_can_be_exported(tiny: Callable[..., ModelConfig]) -> None:
    for model_type, family in FAMILIES.items():
        fields = to_hf_config(tiny(model_type=model_type, sliding_window=None, head_dim=16), "float32")
        exported = family.exported_as or model_type
        (architecture,) = fields["architectures"]
        assert architecture.lower().replace("_", "") == f"{exported.replace('_', '')}forcausallm"
        assert fields["model_type"] == (FAMILIES[exported].text_model_type or exported)


# ---- What is said in other words


def test_lists_that_say_the_same_of_every_layer_are_left_out(tiny: Callable[..., ModelConfig]) -> None:
    config = tiny(**VARIANTS["qwen3-moe"])
    listed = replace(config, moe=replace(config.moe, layers=(True,) * 3), windows=(None,) * 3, rope_layers=(True,) * 3)
    assert read(to_hf_config(listed, "float32")) == config
    no_experts = replace(config, moe=replace(config.moe, layers=(False,) * 3))
    assert read(to_hf_config(no_experts, "float32")) == replace(config, moe=None)


def test_numbers_that_a_kind_of_scaling_does_not_use_are_left_out(tiny: Callable[..., ModelConfig]) -> None:
    linear = RopeScaling(kind="linear", factor=2.0)
    noisy = replace(linear, beta_fast=5, beta_slow=4, truncate=False, low_freq_factor=1.0, original_context_length=9)
    config = tiny()
    assert read(to_hf_config(replace(config, rope_scaling=noisy), "float32")).rope_scaling == linear


def test_yarn_of_a_gguf_states_the_context_that_it_stretches_to(tiny: Callable[..., ModelConfig]) -> None:
    yarn = tiny(**VARIANTS["qwen3-yarn"])
    assert yarn.context_length == 256
    assert read(to_hf_config(replace(yarn, context_length=80), "float32")) == yarn
    longer = replace(yarn, context_length=300)
    assert read(to_hf_config(longer, "float32")) == longer


def gguf_divisors(config: ModelConfig, factor: float, low: float, high: float, original: int) -> tuple[float, ...]:
    """As llama.cpp's converter computes the tensor rope_freqs.weight."""
    divisors = []
    for feature in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * float(np.float32(config.rope_theta) ** np.float32(feature / config.head_dim))
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(float(np.float32(divisor)) for divisor in divisors)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "parameters",
    [
        (8.0, 1.0, 4.0, 8192),
        (32.0, 1.0, 4.0, 8192),
        (16.0, 1.0, 4.0, 8192),
        (8.0, 1.0, 8.0, 4096),
        (4.0, 1.0, 2.5, 999),
    ],
    ids=str,
)
def test_the_divisors_of_a_gguf_become_the_parameters_they_came_from(
    tiny: Callable[..., ModelConfig], head_dim: int, parameters: tuple[float, float, float, int]
) -> None:
    config = tiny(head_dim=head_dim)
    factor, low, high, original = parameters
    scaling = RopeScaling(
        kind="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high, original_context_length=original
    )
    divisors = RopeScaling(kind="factors", factors=gguf_divisors(config, *parameters))
    written = read(to_hf_config(replace(config, rope_scaling=divisors), "float32"))
    assert written == replace(config, rope_scaling=scaling)
    np.testing.assert_allclose(
        rope_frequencies(written), rope_frequencies(replace(config, rope_scaling=divisors)), rtol=1e-6
    )


def test_other_divisors_are_refused(tiny: Callable[..., ModelConfig]) -> None:
    config = tiny(head_dim=64)
    divisors = list(gguf_divisors(config, 8.0, 1.0, 4.0, 8192))
    divisors[20] *= 1.01
    scaling = RopeScaling(kind="factors", factors=tuple(divisors))
    (problem,) = problems_of(replace(config, rope_scaling=scaling))
    assert "divided by 1 to 8" in problem
    assert "Export from a checkpoint that was converted from the Hugging Face files" in problem
    rising = RopeScaling(kind="factors", factors=tuple(float(n) for n in range(1, 33)))
    assert "1 to 32" in problems_of(replace(config, rope_scaling=rising))[0]


# ---- What cannot be said


@pytest.mark.parametrize(
    ("model_type", "changes", "field"),
    [
        ("llama", {"qk_norm": True}, "qk_norm is True"),
        ("llama", {"o_bias": True}, "o_bias is True"),
        ("llama", {"windows": (4, 4)}, r"windows is \(4, 4\)"),
        ("llama", {"rope_layers": (True, False)}, r"rope_layers is \(True, False\)"),
        ("llama", {"moe": MoEConfig(num_experts=2, experts_per_token=1, intermediate_size=4)}, "moe is MoEConfig"),
        ("mistral", {"windows": (4, None)}, r"windows is \(4, None\)"),
        ("mistral", {"mlp_bias": True}, "mlp_bias is True"),
        ("mistral", {"qkv_bias": True}, "qkv_bias is True"),
        ("qwen2", {"windows": (4, 5)}, r"windows is \(4, 5\)"),
        ("qwen2", {"qkv_bias": False}, "qkv_bias is False"),
        ("qwen3", {"qk_norm": False}, "qk_norm is False"),
        ("qwen3_moe", {"windows": (None, 5)}, r"windows is \(None, 5\)"),
        ("llama", {"rope_scaling": RopeScaling(kind="linear", factor=2.0, attention_factor=1.5)}, "rope_scaling is"),
        (
            "llama",
            {"rope_scaling": RopeScaling(kind="dynamic", factor=2.0, original_context_length=64)},
            "context_length is 64, .* it would be read as 128",
        ),
    ],
)
def test_what_config_json_cannot_express_is_refused(
    tiny: Callable[..., ModelConfig], model_type: str, changes: dict[str, Any], field: str
) -> None:
    config = replace(tiny(model_type=model_type, sliding_window=None), **changes)
    with pytest.raises(ConversionError, match=field) as caught:
        to_hf_config(config, "float32")
    assert len(caught.value.problems) == 1
    assert f"a {model_type!r} model cannot express" in str(caught.value)


def test_all_of_it_is_told_at_once(tiny: Callable[..., ModelConfig]) -> None:
    config = replace(tiny(), qk_norm=True, windows=(3, None))
    assert [problem.split()[0] for problem in problems_of(config)] == ["qk_norm", "windows"]


def test_an_unknown_family_is_refused(tiny: Callable[..., ModelConfig]) -> None:
    (problem,) = problems_of(replace(tiny(), model_type="gemma"))
    assert problem.startswith("model_type 'gemma' cannot be exported; supported: llama, mistral, qwen2")


# ---- Any config that a family can have

NUMBERS, SIZES = st.floats(1.0, 64.0), st.integers(1, 4)


@st.composite
def scalings(draw: st.DrawFn, context: int) -> tuple[dict[str, Any] | None, int]:
    """A rotary scaling, and the context length that goes with it."""
    kind, factor = draw(st.sampled_from(["none", "linear", "dynamic", "llama3", "yarn"])), draw(NUMBERS)
    original = draw(st.integers(1, 5000))
    scaling = {"kind": kind, "factor": factor, "original_context_length": original}
    if kind == "none":
        return None, context
    if kind == "linear":
        return {"kind": kind, "factor": factor}, context
    if kind == "llama3":
        low = draw(st.floats(0.5, 4.0))
        return {**scaling, "low_freq_factor": low, "high_freq_factor": low + draw(st.floats(0.5, 4.0))}, context
    if kind == "dynamic":
        return scaling, max(original, int(factor * original))
    band = {name: draw(NUMBERS) for name in ("beta_fast", "beta_slow", "attention_factor")}
    return {**scaling, **band, "truncate": draw(st.booleans())}, max(context, int(factor * original))


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """The JSON of a config that its family can have."""
    family = FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))]
    layers, kv_heads = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    flags = st.lists(st.booleans(), min_size=layers, max_size=layers)
    scaling, context = draw(scalings(draw(st.integers(1, 100_000))))
    window, slides = draw(st.integers(1, 4096)), draw(flags)
    if family.windows is None:
        slides = [False] * layers
    elif family.windows.layers == "all":
        slides = slides[:1] * layers
    rotated = draw(flags) if family.skips_rope else [True] * layers
    moe, mixtures = None, draw(flags)
    sparse = "decoder_sparse_step" in family.defaults
    if family.moe and (any(mixtures) or not sparse):
        moe = {
            "num_experts": draw(st.integers(3, 9)),
            "experts_per_token": draw(st.integers(1, 3)),
            "intermediate_size": draw(st.integers(1, 9)),
            "normalize_weights": family.normalizes == "always" or draw(st.booleans()),
            "layers": None if all(mixtures) or not sparse else mixtures,
            "shared_size": draw(st.integers(1, 9)) if family.shared_expert else None,
            "shared_gate": family.shared_expert,
        }
    biased = family.attention_bias == "config" and draw(st.booleans())
    head_dim = 2 * draw(st.integers(1, 128))
    rotary = draw(st.sampled_from([None, *range(2, head_dim, 2)])) if family.rotary_factor else None
    nets = draw(flags) if family.delta_nets else []
    keys = draw(st.integers(1, 8))
    shape = {name: draw(st.integers(1, 128)) for name in ("key_head_dim", "value_head_dim")}
    shape |= {"num_key_heads": keys, "num_value_heads": keys * draw(st.integers(1, 4)), "conv_size": draw(SIZES)}
    return {
        "model_type": family.model_type,
        "vocab_size": draw(st.integers(1, 300_000)),
        "hidden_size": draw(st.integers(1, 9000)),
        "intermediate_size": draw(st.integers(1, 30_000)),
        "num_layers": layers,
        "num_heads": kv_heads * draw(st.integers(1, 8)),
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "context_length": context,
        "rms_norm_eps": draw(st.floats(1e-12, 1e-3)),
        "rope_theta": draw(st.floats(1.0, 1e8)),
        "rope_scaling": scaling,
        "tie_embeddings": draw(st.booleans()),
        "qkv_bias": biased or family.attention_bias == "qkv",
        "o_bias": biased,
        "mlp_bias": family.mlp_bias and draw(st.booleans()),
        "qk_norm": family.qk_norm,
        "moe": moe,
        "windows": [window if slide else None for slide in slides] if any(slides) else None,
        "rope_layers": None if all(rotated) else rotated,
        "rotary_dim": rotary,
        "output_gate": family.output_gate,
        "centered_norm": family.centered_norm,
        "mixers": ["delta_net" if net else "attention" for net in nets] if any(nets) else None,
        "delta_net": shape if any(nets) else None,
    }


def test_every_number_of_rotated_features_survives() -> None:
    """46 * (26 / 46) is a hair below 26, and would be read as 25."""
    family = next(family for family in FAMILIES.values() if family.rotary_factor is not None)
    for head_dim in range(2, 513, 2):
        for rotated in range(2, head_dim + 1, 2):
            config: Any = SimpleNamespace(rotated_features=rotated, head_dim=head_dim)
            assert (read_rotary_dim(_rotary_factor(config, family), family, head_dim) or head_dim) == rotated


@given(fields=configs())
def test_any_config_survives(fields: dict[str, Any]) -> None:
    config = ModelConfig.from_json(json.dumps(fields))
    # The text of Qwen3-VL is exported as Qwen3.
    exported = FAMILIES[config.model_type].exported_as or config.model_type
    assert read(to_hf_config(config, "float32")) == replace(config, model_type=exported)
