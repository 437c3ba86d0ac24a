"""GGUF files: metadata into a config, tensors dequantised, and everything that is refused."""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from jllm_convert.errors import ConversionError
from jllm_convert.matching.rules import match_tensors
from jllm_convert.sources.gguf.source import GGUFSource
from jllm_core import ModelConfig, MoEConfig, RopeScaling

Tensors = dict[str, np.ndarray]
Write = Callable[..., Path]


@pytest.fixture
def config(tiny_config: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    # Rows of 32 and 64, since GGUF quantises blocks of 32.
    return tiny_config(hidden_size=32, intermediate_size=64, head_dim=8, tie_word_embeddings=True)


@pytest.fixture
def hf(config: dict[str, Any], hf_tensors: Callable[..., Tensors]) -> Tensors:
    return hf_tensors(config)


@pytest.fixture
def metadata(config: dict[str, Any], gguf_metadata: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return gguf_metadata(config)


@pytest.fixture
def tensors(config: dict[str, Any], hf: Tensors, gguf_tensors: Callable[..., Tensors]) -> Tensors:
    return gguf_tensors(config, hf)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def arrays_of(source: GGUFSource) -> Tensors:
    return {match.array: match.read() for match in match_tensors(source, source.config())}


def test_the_config_is_read_from_the_metadata(
    path: Path, write_gguf: Write, metadata: dict[str, Any], tensors: Tensors
) -> None:
    assert GGUFSource(write_gguf(path, metadata, tensors)).config() == ModelConfig(
        model_type="llama",
        vocab_size=11,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        context_length=64,
        rms_norm_eps=1e-5,  # the file has the float32 next to it
        rope_theta=500000.0,
        tie_embeddings=True,
    )


def test_what_llama_cpp_leaves_out_has_its_defaults(
    path: Path, write_gguf: Write, metadata: dict[str, Any], tensors: Tensors
) -> None:
    absent = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base")
    less = {name: value for name, value in metadata.items() if name not in (*absent, "vocab_size")}
    config = GGUFSource(write_gguf(path, less, tensors)).config()
    assert (config.num_kv_heads, config.head_dim, config.rope_theta, config.vocab_size) == (4, 8, 10000.0, 11)


def test_rows_of_llama_are_put_back_in_order(
    path: Path,
    write_gguf: Write,
    config: dict[str, Any],
    metadata: dict[str, Any],
    hf: Tensors,
    tensors: Tensors,
    expected_arrays: Callable[..., Tensors],
) -> None:
    assert not np.array_equal(tensors["blk.0.attn_k.weight"], hf["model.layers.0.self_attn.k_proj.weight"])
    arrays, expected = arrays_of(GGUFSource(write_gguf(path, metadata, tensors))), expected_arrays(config, hf)
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


def test_qwen3_is_read_as_it_stands(
    path: Path,
    write_gguf: Write,
    config: dict[str, Any],
    metadata: dict[str, Any],
    hf_tensors: Callable[..., Tensors],
    gguf_tensors: Callable[..., Tensors],
    expected_arrays: Callable[..., Tensors],
) -> None:
    config = {**config, "model_type": "qwen3", "tie_word_embeddings": False}
    hf = hf_tensors(config)
    source = GGUFSource(write_gguf(path, metadata, gguf_tensors(config, hf), architecture="qwen3"))
    model = source.config()
    assert (model.model_type, model.qk_norm, model.tie_embeddings) == ("qwen3", True, False)
    arrays, expected = arrays_of(source), expected_arrays(config, hf)
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


def test_biases_are_seen_in_the_tensors(
    path: Path,
    write_gguf: Write,
    config: dict[str, Any],
    metadata: dict[str, Any],
    hf_tensors: Callable[..., Tensors],
    gguf_tensors: Callable[..., Tensors],
    expected_arrays: Callable[..., Tensors],
) -> None:
    config = {**config, "attention_bias": True, "mlp_bias": True}
    hf = hf_tensors(config)
    source = GGUFSource(write_gguf(path, metadata, gguf_tensors(config, hf)))
    model = source.config()
    assert (model.qkv_bias, model.o_bias, model.mlp_bias) == (True, True, True)
    arrays, expected = arrays_of(source), expected_arrays(config, hf)
    for name in ("layers.1.attn.q_bias", "layers.1.attn.k_bias", "layers.1.attn.v_bias", "layers.0.ffw.b_down"):
        np.testing.assert_array_equal(arrays[name], expected[name], err_msg=name)


@pytest.mark.parametrize(
    ("kind", "dtype", "error"),
    [
        (Kind.F32, np.float32, 0),
        (Kind.F16, np.float16, 2e-3),
        (Kind.BF16, ml_dtypes.bfloat16, 2e-2),
        (Kind.Q8_0, np.float32, 3e-2),
        (Kind.Q4_1, np.float32, 0.3),
    ],
)
def test_every_kind_of_tensor_is_read(
    path: Path, write_gguf: Write, metadata: dict[str, Any], tensors: Tensors, kind: Kind, dtype: Any, error: float
) -> None:
    name = "blk.1.ffn_up.weight"
    source = GGUFSource(write_gguf(path, metadata, tensors, types={name: kind}))
    tensor = source.tensors[name]
    assert (tensor.shape, tensor.dtype, tensor.where) == ((64, 32), dtype, path)
    values = tensor.read()
    assert (values.shape, values.dtype) == ((64, 32), dtype)
    np.testing.assert_array_equal(
        values.astype(np.float32), gguf.dequantize(gguf.quantize(tensors[name], kind), kind).reshape(64, 32)
    )
    assert np.abs(values.astype(np.float32) - tensors[name]).max() <= error
    np.testing.assert_array_equal(source.tensors["blk.0.ffn_up.weight"].read(), tensors["blk.0.ffn_up.weight"])


def test_rotary_factors_are_taken_up_and_are_no_left_over(
    path: Path, write_gguf: Write, metadata: dict[str, Any], tensors: Tensors
) -> None:
    factors = {"rope_freqs.weight": np.array([1, 1.5, 8, 32], np.float32)}
    source = GGUFSource(write_gguf(path, metadata, tensors | factors))
    assert source.config().rope_scaling == RopeScaling(kind="factors", factors=(1.0, 1.5, 8.0, 32.0))
    assert "layers.1.attn.q" in arrays_of(source)


def test_rotary_factors_of_another_number_are_refused(
    path: Path, write_gguf: Write, metadata: dict[str, Any], tensors: Tensors
) -> None:
    source = GGUFSource(write_gguf(path, metadata, tensors | {"rope_freqs.weight": np.ones(3, np.float32)}))
    with pytest.raises(ConversionError, match="3 factors, head_dim 8 needs 4"):
        source.config()


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.5}, RopeScaling(kind="linear", factor=2.5)),
        # llama.cpp takes a factor without a type as linear.
        ({"rope.scaling.factor": 2.5}, RopeScaling(kind="linear", factor=2.5)),
    ],
    ids=str,
)
def test_rope_scaling_is_read(
    path: Path,
    write_gguf: Write,
    metadata: dict[str, Any],
    tensors: Tensors,
    scaling: dict[str, Any],
    expected: RopeScaling | None,
) -> None:
    assert GGUFSource(write_gguf(path, metadata | scaling, tensors)).config().rope_scaling == expected


def test_scaling_and_factors_together_are_refused(
    path: Path, write_gguf: Write, metadata: dict[str, Any], tensors: Tensors
) -> None:
    both = metadata | {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    source = GGUFSource(write_gguf(path, both, tensors | {"rope_freqs.weight": np.ones(4, np.float32)}))
    with pytest.raises(ConversionError, match="rope"):
        source.config()


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}


@pytest.mark.parametrize(
    ("stated", "betas"),
    [
        ({"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}, (32, 1)),
        ({"yarn_beta_fast": 16.0}, (16, 1)),
        ({"yarn_beta_slow": 2.5}, (32, 2.5)),
        ({"yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "attn_factor": 1.0}, (32, 1)),
        ({"yarn_ext_factor": -1.0, "yarn_log_multiplier": 0.0}, (32, 1)),
    ],
    ids=str,
)
def test_yarn_s_band_is_read_and_its_factors_may_be_stated_where_they_change_nothing(
    path: Path, write_gguf: Write, metadata: dict[str, Any], tensors: Tensors, stated: Any, betas: Any
) -> None:
    own = {f"rope.scaling.{name}": value for name, value in stated.items()}
    config = GGUFSource(write_gguf(path, metadata | YARN | own, tensors)).config()
    assert config.rope_scaling == RopeScaling(
        kind="yarn",
        factor=4.0,
        original_context_length=16,
        attention_factor=0.1 * math.log(4.0) + 1,
        beta_fast=betas[0],
        beta_slow=betas[1],
    )


def test_yarn_s_band_is_nothing_to_other_types(
    path: Path, write_gguf: Write, metadata: dict[str, Any], tensors: Tensors
) -> None:
    own = {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.yarn_ext_factor": 0.0}
    config = GGUFSource(write_gguf(path, metadata | LINEAR | own, tensors)).config()
    assert config.rope_scaling == RopeScaling(kind="linear", factor=4.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**YARN, "rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor must be 1.0 for rope type 'yarn', .* got 0.5"),
        ({**YARN, "rope.scaling.yarn_ext_factor": 0.0}, "yarn_ext_factor must be 1.0 for rope type 'yarn'"),
        ({**LINEAR, "rope.scaling.yarn_ext_factor": 1.0}, "yarn_ext_factor must be 0.0 for rope type 'linear'"),
        ({**YARN, "rope.scaling.yarn_attn_factor": 1.5}, "yarn_attn_factor = 1.5 is not known to this version"),
        ({**YARN, "rope.scaling.attn_factor": 0.5}, "rope.scaling.attn_factor = 0.5 is not known"),
        ({**YARN, "rope.scaling.attn_factor": 0.0}, "rope.scaling.attn_factor = 0.0 is not known"),
        ({**YARN, "rope.scaling.yarn_log_multiplier": 0.25}, "yarn_log_multiplier = 0.25 is not known"),
        ({**YARN, "rope.scaling.yarn_beta_fast": "32"}, "yarn_beta_fast must be a number, got '32'"),
        ({"rope.scaling.type": "yarn"}, "rope type 'yarn' needs rope.scaling.factor"),
        ({"expert_count": 8}, "metadata llama.expert_count = 8 is not known to this version"),
        ({"attention.sliding_window": 128}, "metadata llama.attention.sliding_window = 128 is not known"),
        ({"attention.value_length": 16}, "llama.attention.value_length is 16, only the head's own width 8"),
        ({"rope.dimension_count": 4}, "llama.rope.dimension_count is 4, only the head's own width 8"),
        ({"attention.head_count_kv": 3}, "num_heads must be a multiple of num_kv_heads"),
        ({"attention.head_count": 0, "attention.key_length": 8}, "num_heads must be a whole number of at least 1"),
        ({"attention.layer_norm_rms_epsilon": 0.0}, "rms_norm_eps must be a number above 0"),
        ({"feed_forward_length": [64, 32]}, "feed_forward_length must be a whole number, got"),
        ({"attention.head_count_kv": [2, 1]}, "attention.head_count_kv must be a whole number"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked_types")
def test_what_is_not_supported_is_refused(
    path: Path, write_gguf: Write, metadata: dict[str, Any], tensors: Tensors, changes: dict[str, Any], message: str
) -> None:
    source = GGUFSource(write_gguf(path, metadata | changes, tensors))
    with pytest.raises(ConversionError, match=message) as caught:
        source.config()
    assert str(caught.value).startswith("model.gguf: ")


def test_all_metadata_problems_are_told_at_once(
    path: Path, write_gguf: Write, metadata: dict[str, Any], tensors: Tensors
) -> None:
    del metadata["block_count"], tensors["token_embd.weight"]
    source = GGUFSource(write_gguf(path, metadata | {"expert_count": 8, "logit_scale": 0.5}, tensors))
    with pytest.raises(ConversionError) as caught:
        source.config()
    assert len(caught.value.problems) == 4
    for word in ("block_count", "token_embd.weight", "expert_count", "logit_scale"):
        assert word in str(caught.value)


def test_other_architectures_are_refused(
    path: Path, write_gguf: Write, metadata: dict[str, Any], tensors: Tensors
) -> None:
    write_gguf(path, metadata, tensors, architecture="gemma2")
    with pytest.raises(
        ConversionError,
        match=r"architecture 'gemma2' is not supported; supported: llama, qwen2, qwen2moe, qwen3, qwen35, qwen35moe, "
        "qwen3moe, qwen3next, qwen3vl, qwen3vlmoe, smollm3$",
    ):
        GGUFSource(path)


def test_parts_of_a_split_model_are_refused_with_the_way_to_join_them(
    path: Path, write_gguf: Write, metadata: dict[str, Any], tensors: Tensors
) -> None:
    write_gguf(path, metadata, tensors, split__count=3)
    with pytest.raises(ConversionError, match=r"is one of 3 parts; join them first: llama-gguf-split --merge"):
        GGUFSource(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.2, 0.5, 0.99])
def test_a_file_that_is_cut_short_is_refused(
    path: Path, write_gguf: Write, metadata: dict[str, Any], tensors: Tensors, share: float
) -> None:
    whole = write_gguf(path, metadata, tensors).read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ConversionError, match=r"model\.gguf.*cut short|ends at byte") as caught:
        GGUFSource(path)
    assert len(caught.value.problems) == 1  # however many tensors are missing


def test_a_file_of_another_format_is_refused(path: Path) -> None:
    for content in (b"PK\x03\x04" + bytes(1000), b"GGUF" + struct.pack("<I", 999) + bytes(1000), b"<html>404</html>"):
        path.write_bytes(content)
        with pytest.raises(ConversionError, match=r"model\.gguf cannot be read as a GGUF file"):
            GGUFSource(path)


def test_a_type_that_cannot_be_dequantised_is_refused_on_opening(
    path: Path, write_gguf: Write, metadata: dict[str, Any], tensors: Tensors
) -> None:
    tensors["blk.0.attn_norm.weight"] = np.ones(32, np.int32)
    write_gguf(path, metadata, tensors)
    with pytest.raises(ConversionError, match=r"blk\.0\.attn_norm\.weight.*I32"):
        GGUFSource(path)


def test_the_end_of_text_ids_are_collected(
    path: Path, write_gguf: Write, metadata: dict[str, Any], tensors: Tensors
) -> None:
    ids = {"tokenizer__ggml__eos_token_id": 7, "tokenizer__ggml__eot_token_id": 3, "tokenizer__ggml__bos_token_id": 1}
    assert GGUFSource(write_gguf(path, metadata, tensors, **ids)).generation_config() == {"eos_token_id": [3, 7]}
    assert GGUFSource(write_gguf(path, metadata, tensors)).generation_config() == {"eos_token_id": []}


# ---- Architectures beside Llama and Qwen3


def test_a_mixture_of_experts(tmp_path: Path, tensors: Tensors, metadata: dict[str, Any], write_gguf: Write) -> None:
    tensors = {name: tensor for name, tensor in tensors.items() if ".ffn_" not in name or "norm" in name}
    random = np.random.default_rng(0)
    shapes = {"gate_inp": (3, 32), "gate_exps": (3, 10, 32), "up_exps": (3, 10, 32), "down_exps": (3, 32, 10)}
    for i in range(2):
        for name, shape in shapes.items():
            tensors[f"blk.{i}.ffn_{name}.weight"] = random.normal(size=shape).astype(np.float32)
        tensors |= {f"blk.{i}.attn_{n}_norm.weight": random.normal(size=8).astype(np.float32) for n in "qk"}
    experts = {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 10}
    path = write_gguf(tmp_path / "m.gguf", metadata | experts, tensors, architecture="qwen3moe")
    source = GGUFSource(path)
    assert source.config().moe == MoEConfig(num_experts=3, experts_per_token=2, intermediate_size=10)
    arrays = {match.array: match.read() for match in match_tensors(source, source.config())}
    for ours, theirs in (("we_gate", "gate_exps"), ("we_up", "up_exps"), ("we_down", "down_exps")):
        expected = tensors[f"blk.1.ffn_{theirs}.weight"].swapaxes(1, 2)
        np.testing.assert_array_equal(arrays[f"layers.1.ffw.{ours}"], expected)
    np.testing.assert_array_equal(arrays["layers.0.ffw.w_router"], tensors["blk.0.ffn_gate_inp.weight"].T)


def test_yarn_and_layers_without_rotation(
    tmp_path: Path, tensors: Tensors, metadata: dict[str, Any], write_gguf: Write
) -> None:
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
    path = write_gguf(tmp_path / "m.gguf", metadata | yarn, tensors, architecture="smollm3")
    read = GGUFSource(path).config()
    assert read.rope_scaling == RopeScaling(
        kind="yarn", factor=4.0, original_context_length=16, attention_factor=0.1 * math.log(4.0) + 1
    )
    assert read.rope_layers is None  # there are only two layers, and it is the fourth that is left out
    path = write_gguf(tmp_path / "n.gguf", metadata | {"block_count": 5}, tensors, architecture="smollm3")
    assert GGUFSource(path).config().rope_layers == (True, True, True, False, True)
