"""ModelConfig and RopeScaling: what they refuse, and their JSON."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from jllm_core import DeltaNetConfig, JLLMError, ModelConfig, MoEConfig, RopeScaling
from jllm_core.config import ConfigError

MakeConfig = Callable[..., ModelConfig]

LLAMA3 = RopeScaling(
    kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=8192
)
LINEAR = RopeScaling(kind="linear", factor=2.5)
YARN = RopeScaling(kind="yarn", factor=4.0, original_context_length=32768, attention_factor=1.13, truncate=False)
DYNAMIC = RopeScaling(kind="dynamic", factor=2.0, original_context_length=4096)
FACTORS = RopeScaling(kind="factors", factors=(1.0, 1.7320508075688772))


@pytest.mark.parametrize("scaling", [None, LLAMA3, LINEAR, DYNAMIC, YARN, FACTORS])
def test_json_round_trip_gives_an_equal_config(make_config: MakeConfig, scaling: RopeScaling | None) -> None:
    config = make_config(
        model_type="qwen3",
        rms_norm_eps=1e-5,
        rope_theta=1_000_000.0,
        rope_scaling=scaling,
        tie_embeddings=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        qk_norm=True,
    )
    again = ModelConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)  # jit takes it as a static argument


def test_json_is_an_object_with_the_field_names(make_config: MakeConfig) -> None:
    fields = json.loads(make_config(rope_scaling=FACTORS).to_json())
    assert fields["hidden_size"] == 12
    assert fields["rope_scaling"]["factors"] == [1.0, 1.7320508075688772]


def test_defaults_may_be_left_out_of_the_json(make_config: MakeConfig) -> None:
    fields = json.loads(make_config().to_json())
    for name in ("rms_norm_eps", "rope_theta", "rope_scaling", "tie_embeddings", "qk_norm"):
        del fields[name]
    assert ModelConfig.from_json(json.dumps(fields)) == make_config()


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "name",
    [
        *("vocab_size", "hidden_size", "intermediate_size", "num_layers"),
        *("num_heads", "num_kv_heads", "head_dim", "context_length"),
    ],
)
@pytest.mark.parametrize("value", [0, -1, 2.0, "2", None, True])
def test_sizes_are_whole_numbers_of_at_least_one(make_config: MakeConfig, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a whole number") as caught:
        make_config(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 4}, "multiple of num_kv_heads, got 6"),
        ({"num_heads": 2, "num_kv_heads": 4}, "multiple of num_kv_heads"),
        ({"head_dim": 5}, "head_dim must be even.*got 5"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta must be a number above 0, got inf"),
        ({"rope_theta": 10**400}, "rope_theta must be a number above 0, got 1000"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a number above 0, got inf"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"num_layers": 10_001}, "num_layers must be at most 10,000, got 10,001"),
        ({"num_layers": 10**9}, "num_layers must be at most 10,000, got 1,000,000,000"),
        ({"rope_scaling": FACTORS, "head_dim": 8}, "2 factors, head_dim 8 needs 4"),
    ],
)
def test_impossible_models_are_refused(make_config: MakeConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "linear", "factor": 0.0}, "factor must be a number above 0"),
        ({"kind": "linear", "factor": float("nan")}, "factor must be a number above 0"),
        (
            {"kind": "llama3", "factor": 8.0, "original_context_length": 8},
            "needs the numbers low_freq_factor and high_freq_factor, got None and None",
        ),
        *(
            ({"kind": kind, "factor": 8.0}, f"original_context_length of rope scaling '{kind}' must be a whole number")
            for kind in ("dynamic", "llama3", "yarn")
        ),
        ({"kind": "yarn", "original_context_length": 8, "beta_fast": 0}, "beta_fast must be a number above 0, got 0"),
        (
            {"kind": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0, "original_context_length": 8},
            "0 < low_freq_factor < high_freq_factor, got 4.0, 4.0",
        ),
        ({"kind": "linear", "factor": float("inf")}, "factor must be a number above 0, got inf"),
        (
            {"kind": "yarn", "original_context_length": 8, "attention_factor": float("inf")},
            "attention_factor must be a number above 0, got inf",
        ),
        (
            {"kind": "llama3", "low_freq_factor": 1.0, "high_freq_factor": float("inf"), "original_context_length": 8},
            "needs the numbers low_freq_factor and high_freq_factor, got 1.0 and inf",
        ),
        ({"kind": "factors", "factors": (1.0, float("inf"))}, "one divisor above 0"),
        ({"kind": "factors"}, "one divisor above 0 for each frequency"),
        ({"kind": "factors", "factors": ()}, "one divisor above 0"),
        ({"kind": "factors", "factors": (1.0, 0.0)}, "one divisor above 0"),
    ],
)
def test_impossible_rope_scalings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RopeScaling(**fields)


@pytest.mark.usefixtures("unchecked_types")
def test_unknown_rope_scalings_are_refused() -> None:
    with pytest.raises(ConfigError, match="'longrope' is not supported; known: linear, dynamic, llama3, yarn, factors"):
        RopeScaling(kind="longrope")  # type: ignore[arg-type]


def test_config_errors_are_jllm_errors() -> None:
    assert issubclass(ConfigError, JLLMError)  # commands print those without a traceback


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object, got list"),
        ("null", "must be a JSON object, got NoneType"),
    ],
)
def test_text_that_is_no_json_object_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_json(text)


def test_unknown_and_missing_fields_are_all_named(make_config: MakeConfig) -> None:
    fields = json.loads(make_config().to_json())
    del fields["num_heads"], fields["head_dim"]
    fields |= {"sliding_window": 4096, "num_experts": 8}
    with pytest.raises(ConfigError, match="newer version") as caught:
        ModelConfig.from_json(json.dumps(fields))
    assert "unknown fields ['num_experts', 'sliding_window']" in str(caught.value)
    assert "missing fields ['head_dim', 'num_heads']" in str(caught.value)


def test_unknown_fields_of_the_rope_scaling_are_named(make_config: MakeConfig) -> None:
    fields = json.loads(make_config(rope_scaling=LINEAR).to_json())
    fields["rope_scaling"]["gamma"] = 32
    with pytest.raises(ConfigError, match=r"RopeScaling: unknown fields \['gamma'\]"):
        ModelConfig.from_json(json.dumps(fields))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "damage",
    [
        {"rope_theta": "10000"},
        {"rms_norm_eps": None},
        {"rope_scaling": 4},
        {"rope_scaling": "linear"},
        {"rope_scaling": {"kind": "linear", "factor": "2"}},
        {"rope_scaling": {"kind": "factors", "factors": 2}},
        {"rope_scaling": {"kind": "factors", "factors": ["2", "2"]}},
        {"tie_embeddings": "false"},
    ],
    ids=str,
)
def test_values_of_the_wrong_type_in_the_json_are_config_errors(
    make_config: MakeConfig, damage: dict[str, Any]
) -> None:
    fields = json.loads(make_config().to_json()) | damage
    with pytest.raises(ConfigError):
        ModelConfig.from_json(json.dumps(fields))


# ---- What differs from layer to layer


def test_layers_differ_where_the_config_says_so(make_config: MakeConfig) -> None:
    moe = MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=8, layers=(False, True))
    config = make_config(moe=moe, windows=(None, 16), rope_layers=(True, False))
    assert [config.is_moe(layer) for layer in (0, 1)] == [False, True]
    assert [config.window(layer) for layer in (0, 1)] == [None, 16]
    assert [config.rotates(layer) for layer in (0, 1)] == [True, False]
    assert ModelConfig.from_json(config.to_json()) == config
    hash(ModelConfig.from_json(config.to_json()))  # a static argument of jit
    alike = make_config(moe=replace(moe, layers=None))
    assert alike.is_moe(0)
    assert alike.window(0) is None
    assert alike.rotates(0)
    assert not make_config().is_moe(0)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": (None,)}, "windows must have an entry for each of 2 layers"),
        ({"windows": (None, 0)}, "each of windows must be a whole number of at least 1, got 0"),
        ({"rope_layers": (True, 1)}, "each of rope_layers must be true or false, got 1"),
        ({"rope_layers": (True,) * 3}, "rope_layers must have an entry for each of 2 layers"),
    ],
)
def test_what_layers_cannot_be(make_config: MakeConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_config(**changes)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 5}, "experts_per_token must be at most num_experts, got 5 of 4"),
        ({"num_experts": 0}, "num_experts must be a whole number of at least 1, got 0"),
        ({"num_experts": 100_001}, "num_experts must be at most 100,000, got 100,001"),
        ({"num_experts": 50_001}, "num_layers times num_experts must be at most 100,000, got 100,002"),
        ({"normalize_weights": 1}, "normalize_weights must be true or false, got 1"),
        ({"layers": (True,)}, "moe.layers must have an entry for each of 2 layers"),
        ({"layers": (True, 2)}, "each of moe.layers must be true or false, got 2"),
    ],
)
def test_what_a_mixture_cannot_be(make_config: MakeConfig, changes: dict[str, Any], message: str) -> None:
    sizes = {"num_experts": 4, "experts_per_token": 2, "intermediate_size": 8}
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_config(moe=MoEConfig(**{**sizes, **changes}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moe": 3}, "moe must be a JSON object"),
        ({"moe": {"num_experts": 4}}, "MoEConfig: unknown fields [], missing fields ['experts_per_token'"),
        ({"windows": "all"}, "windows must be a list, got 'all'"),
    ],
)
def test_json_of_layers_that_is_not_a_config(make_config: MakeConfig, fields: dict[str, Any], message: str) -> None:
    text = json.dumps({**json.loads(make_config().to_json()), **fields})
    with pytest.raises(ConfigError, match=re.escape(message)):
        ModelConfig.from_json(text)


HYBRID: dict[str, Any] = {
    "num_layers": 2,
    "mixers": ("delta_net", "attention"),
    "delta_net": DeltaNetConfig(num_key_heads=1, num_value_heads=2, key_head_dim=4, value_head_dim=6),
}


def test_json_round_trip_of_a_hybrid_gives_an_equal_config(make_config: MakeConfig) -> None:
    moe = MoEConfig(num_experts=2, experts_per_token=1, intermediate_size=4, shared_size=8, shared_gate=True)
    config = make_config(**HYBRID, moe=moe, rotary_dim=2, output_gate=True, centered_norm=True)
    again = ModelConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)


def test_json_from_before_hybrids_is_read_as_before(make_config: MakeConfig) -> None:
    fields = json.loads(make_config().to_json())
    for name in ("rotary_dim", "output_gate", "centered_norm", "mixers", "delta_net"):
        del fields[name]
    assert ModelConfig.from_json(json.dumps(fields)) == make_config()


def test_the_layers_of_a_hybrid_are_told_by_what_mixes_their_tokens(make_config: MakeConfig) -> None:
    config = make_config(**HYBRID)
    assert config.layers_with("attention") == (1,)
    assert config.layers_with("delta_net") == (0,)
    assert make_config().layers_with("attention") == tuple(range(make_config().num_layers))
    assert (config.kv_arrays, make_config().kv_arrays) == (2, 2 * make_config().num_layers)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_dim": 3}, "rotary_dim must be even, got 3"),
        ({"rotary_dim": 0}, "rotary_dim must be a whole number of at least 1, got 0"),
        ({"rotary_dim": 6}, "rotary_dim must be at most 4, got 6"),
        ({"rotary_dim": 2, "rope_scaling": FACTORS}, "2 factors, rotary_dim 2 needs 1"),
        ({"output_gate": 1}, "output_gate must be true or false, got 1"),
        ({"centered_norm": None}, "centered_norm must be true or false, got None"),
        ({**HYBRID, "mixers": ("delta_net",)}, "mixers must have an entry for each of 2 layers"),
        ({**HYBRID, "mixers": ("delta_net", "mamba")}, "each of mixers is one of attention, delta_net, got 'mamba'"),
        ({**HYBRID, "mixers": ("attention", "attention")}, "both or neither"),
        ({**HYBRID, "mixers": None}, "both or neither, got mixers None and delta_net DeltaNetConfig"),
        ({**HYBRID, "delta_net": None}, "both or neither"),
    ],
)
def test_impossible_hybrids_are_refused(make_config: MakeConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**changes)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (DeltaNetConfig, {"num_key_heads": 3}, "num_value_heads must be a multiple of num_key_heads, got 4 and 3"),
        (DeltaNetConfig, {"conv_size": 0}, "conv_size must be a whole number"),
        (DeltaNetConfig, {"key_head_dim": 1.5}, "key_head_dim must be a whole number"),
        (MoEConfig, {"shared_size": 0}, "shared_size must be a whole number"),
        (MoEConfig, {"shared_gate": True}, "shared_gate is of a shared expert, whose width shared_size says"),
        (MoEConfig, {"shared_gate": "yes"}, "shared_gate must be true or false"),
    ],
)
def test_impossible_parts_of_a_hybrid_are_refused(kind: type, changes: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {
        DeltaNetConfig: {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 4, "value_head_dim": 4},
        MoEConfig: {"num_experts": 2, "experts_per_token": 1, "intermediate_size": 4},
    }[kind]
    with pytest.raises(ConfigError, match=message):
        kind(**{**fields, **changes})
