"""Qwen2-MoE, the text of Qwen3-VL, Qwen3-Next and Qwen3.5: every array from every form in which they are published."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jllm_convert import ConversionError, convert, export, inspect, verify
from jllm_convert.families import FAMILIES, exported_family
from jllm_convert.families.tensor_parts import shapes_by_owner, slots_of
from jllm_convert.matching.rules import match_tensors
from jllm_convert.sources.huggingface.config import read_hf_config
from jllm_convert.sources.opening import open_source
from jllm_core import checkpoint
from jllm_core.array_info import named_leaves
from jllm_core.checkpoint import box_shape, whole
from jllm_core.model import forward
from jllm_core.weight_specs import abstract_weights
from safetensors.numpy import load_file

from . import published_models as published

Tensors = dict[str, np.ndarray]
FAMILY_NAMES = sorted(published.CONFIGS)
NESTED = [name for name in FAMILY_NAMES if "text_config" in published.CONFIGS[name]]
MIXTURES = [name for name in FAMILY_NAMES if "num_experts" in published.text_of(name)]


def read_all(path: Path) -> Tensors:
    source = open_source(path)
    return {match.array: match.read() for match in match_tensors(source, source.config())}


def assert_equal(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.fixture
def folder(tmp_path: Path, write_hf: Callable[..., Path]) -> Callable[..., Path]:
    def make(model_type: str, change: Callable[[Tensors], Tensors] = dict, **changes: Any) -> Path:
        config = {**published.CONFIGS[model_type], **changes}
        tensors = published.hf_tensors(model_type, published.arrays(model_type))
        if "text_config" in config:
            tensors = published.nested(model_type, tensors)
        return write_hf(tmp_path / "source", config, change(tensors))

    return make


@pytest.fixture
def gguf_file(tmp_path: Path, write_gguf: Callable[..., Path]) -> Callable[..., Path]:
    def make(model_type: str, extra: Tensors | None = None, types: Any = None, **changes: Any) -> Path:
        tensors = published.gguf_tensors(model_type, published.arrays(model_type)) | (extra or {})
        metadata = {**published.gguf_metadata(model_type), **changes}
        known = {name: value for name, value in metadata.items() if value is not None}
        return write_gguf(tmp_path / "model.gguf", known, tensors, published.ARCHITECTURES[model_type], types)

    return make


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_every_array_of_a_folder(folder: Callable[..., Path], model_type: str) -> None:
    assert_equal(read_all(folder(model_type)), published.arrays(model_type))


@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "qwen3_vl_moe"])
def test_experts_one_by_one(tmp_path: Path, write_hf: Callable[..., Path], model_type: str) -> None:
    made = published.arrays(model_type)
    tensors = published.hf_tensors(model_type, made, one_by_one=True)
    assert_equal(read_all(write_hf(tmp_path / "source", published.CONFIGS[model_type], tensors)), made)


def test_experts_of_qwen3_vl_as_transformers_5_may_save_them(tmp_path: Path, write_hf: Callable[..., Path]) -> None:
    made = published.arrays("qwen3_vl_moe")
    tensors = {
        name: np.ascontiguousarray(each.swapaxes(1, 2)) if ".experts." in name else each
        for name, each in published.hf_tensors("qwen3_vl_moe", made).items()
    }
    assert_equal(read_all(write_hf(tmp_path / "source", published.CONFIGS["qwen3_vl_moe"], tensors)), made)


@pytest.mark.parametrize("model_type", NESTED)
@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model.", ""])
def test_prefixes_are_found_from_the_tensors(
    tmp_path: Path, write_hf: Callable[..., Path], model_type: str, prefix: str
) -> None:
    made = published.arrays(model_type)
    head = "language_model.lm_head." if prefix.startswith("language") else "lm_head."
    tensors = {
        name.replace("model.", prefix, 1) if name.startswith("model.") else name.replace("lm_head.", head): each
        for name, each in published.hf_tensors(model_type, made).items()
    }
    assert_equal(read_all(write_hf(tmp_path / "source", published.CONFIGS[model_type], tensors)), made)


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
def test_a_flat_folder_of_the_text_model(tmp_path: Path, write_hf: Callable[..., Path], model_type: str) -> None:
    made = published.arrays(model_type)
    path = write_hf(tmp_path / "source", published.text_of(model_type), published.hf_tensors(model_type, made))
    assert_equal(read_all(path), made)
    assert open_source(path).config() == read_hf_config(published.CONFIGS[model_type], "config.json")


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_the_slots_of_a_tensor_fill_it_and_those_of_an_array_too(model_type: str) -> None:
    family, config = FAMILIES[model_type], read_hf_config(published.CONFIGS[model_type], "config.json")
    infos = named_leaves(abstract_weights(config))
    shapes = shapes_by_owner(infos)
    for naming in ("hf", "gguf"):
        covered: dict[tuple[str, Any], np.ndarray] = {}
        for rule in family.rules:
            name = rule.name_in(naming)
            for i in range(3 if "{i}" in rule.array else 1):
                array = rule.array.format(i=i)
                if name is None or "{e}" in name or rule.mixer not in (None, config.mixer(i)) or array not in infos:
                    continue
                layout = rule.layout_in(naming)
                filled = np.zeros(infos[array].shape, int)
                for slot in slots_of(layout, array, shapes):
                    shape = box_shape(slot.place)
                    filled[slot.place] += 1
                    # A name with two layouts stands for two tensors.
                    theirs = slot.layout.source_shape(shape)
                    tensor = covered.setdefault((name.format(i=i), theirs), np.zeros(theirs, int))
                    tensor[slot.layout.source_box(whole(shape), shape)] += 1
                assert (filled == 1).all(), array
        for key, counts in covered.items():
            assert (counts == 1).all(), key


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_boxes_are_read_as_parts_of_the_whole(folder: Callable[..., Path], model_type: str) -> None:
    source = open_source(folder(model_type))
    for match in match_tensors(source, source.config()):
        whole_array = match.read()
        for axis, size in enumerate(match.info.shape):
            if match.info.logical_axes[axis] == "head_dim" and match.info.shape[axis - 1] > 1 and axis:
                continue  # no chunk cuts a head
            box = list(whole(match.info.shape))
            box[axis] = slice(size // 3, size - size // 3)
            np.testing.assert_array_equal(match.read(tuple(box)), whole_array[tuple(box)], err_msg=match.array)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_every_array_of_a_gguf_file(gguf_file: Callable[..., Path], model_type: str) -> None:
    path, made = gguf_file(model_type), published.arrays(model_type)
    got = read_all(path)
    for name in [name for name in made if name.endswith("a_log")]:
        np.testing.assert_allclose(got.pop(name), made.pop(name), rtol=0, atol=2e-6)
    assert_equal(got, made)
    wanted = read_hf_config(published.CONFIGS[model_type], "config.json")
    assert open_source(path).config() == wanted


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5"])
def test_a_gguf_file_and_its_twin_have_the_same_logits(
    folder: Callable[..., Path], gguf_file: Callable[..., Path], model_type: str
) -> None:
    """Their decays differ by the rounding of exp and log; everything else is equal, as for the others."""
    tokens = jnp.arange(2 * 9).reshape(2, 9) % published.VOCABULARY
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))

    def logits(path: Path) -> np.ndarray:
        config = open_source(path).config()
        infos, made = abstract_weights(config), read_all(path)
        weights = jax.tree.unflatten(
            jax.tree.structure(infos), [jnp.asarray(0.2 * made[name]) for name in named_leaves(infos)]
        )
        return np.asarray(forward(tokens, positions, weights, config)[0])

    np.testing.assert_allclose(logits(gguf_file(model_type)), logits(folder(model_type)), atol=1e-5)


def test_a_gguf_file_with_experts_gate_and_up_in_one(tmp_path: Path, write_gguf: Callable[..., Path]) -> None:
    made = published.arrays("qwen3_5_moe")
    tensors = published.gguf_tensors("qwen3_5_moe", made)
    for i in range(3):
        parts = [tensors.pop(f"blk.{i}.ffn_{name}_exps.weight") for name in ("gate", "up")]
        tensors[f"blk.{i}.ffn_gate_up_exps.weight"] = np.concatenate(parts, axis=1)
        tensors[f"blk.{i}.ffn_gate_inp_shexp.weight"] = tensors[f"blk.{i}.ffn_gate_inp_shexp.weight"][None]
    path = write_gguf(tmp_path / "m.gguf", published.gguf_metadata("qwen3_5_moe"), tensors, "qwen35moe")
    got = read_all(path)
    for name in ("layers.0.ffw.we_gate", "layers.2.ffw.we_up", "layers.1.ffw.shared_gate"):
        np.testing.assert_array_equal(got[name], made[name])


def test_a_gguf_file_of_the_first_converter_of_qwen3_next(tmp_path: Path, write_gguf: Callable[..., Path]) -> None:
    made = published.arrays("qwen3_next")
    theirs, tensors = published.hf_tensors("qwen3_next", made), published.gguf_tensors("qwen3_next", made)
    for i in (0, 2):
        del tensors[f"blk.{i}.attn_qkv.weight"], tensors[f"blk.{i}.attn_gate.weight"]
        tensors[f"blk.{i}.ssm_in.weight"] = theirs[f"model.layers.{i}.linear_attn.in_proj_qkvz.weight"]
    got = read_all(write_gguf(tmp_path / "m.gguf", published.gguf_metadata("qwen3_next"), tensors, "qwen3next"))
    for name in ("q", "k", "v", "z"):
        np.testing.assert_array_equal(got[f"layers.2.attn.{name}"], made[f"layers.2.attn.{name}"])


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
def test_blocks_that_guess_further_tokens_are_left_out_of_a_gguf_file(
    gguf_file: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    extra = {f"blk.3.{name}.weight": np.ones((4, 4), np.float32) for name in ("nextn.eh_proj", "attn_q", "ffn_up")}
    recurrent = [*published.gguf_metadata(model_type)["attention.recurrent_layers"], False]
    path = gguf_file(
        model_type, extra, block_count=4, nextn_predict_layers=1, **{"attention.recurrent_layers": recurrent}
    )
    assert read_all(path).keys() == published.arrays(model_type).keys()
    counts = {"tensors of multi-token prediction": 3}
    assert inspect(path).left_out == counts
    made = convert(path, tmp_path / "made")
    assert made.manifest.source["left_out"] == counts
    assert "model.gguf: left out 3 tensors of multi-token prediction" in made.warnings


def test_layers_of_a_gguf_file_by_the_interval_or_the_list(gguf_file: Callable[..., Path]) -> None:
    def mixers(**changes: Any) -> Any:
        return open_source(gguf_file("qwen3_5", **changes)).config().mixers

    listed = mixers()
    assert mixers(**{"attention.recurrent_layers": None}) == listed
    assert mixers(**{"attention.recurrent_layers": None, "full_attention_interval": None}) == ("delta_net",) * 3
    with pytest.raises(ConversionError, match="recurrent_layers must be true or false for each of 3 layers"):
        mixers(**{"attention.recurrent_layers": [True]})


def test_what_llama_cpp_does_anyway_may_be_stated(gguf_file: Callable[..., Path]) -> None:
    known = {"expert_gating_func": 1, "expert_weights_norm": True, "expert_shared_count": 1}
    assert open_source(gguf_file("qwen3_5_moe", **known)).config() == open_source(gguf_file("qwen3_5_moe")).config()
    for name, other in (("expert_gating_func", 2), ("expert_shared_count", 2)):
        with pytest.raises(ConversionError, match=f"metadata qwen35moe.{name} = 2 is not known"):
            open_source(gguf_file("qwen3_5_moe", **{name: other})).config()
    with pytest.raises(ConversionError, match=r"qwen2moe.expert_weights_norm = True is not known"):
        open_source(gguf_file("qwen2_moe", expert_weights_norm=True)).config()


def test_a_gguf_decay_above_zero_is_refused(gguf_file: Callable[..., Path]) -> None:
    path = gguf_file("qwen3_5", {"blk.0.ssm_a": np.ones(published.VALUE_HEADS, np.float32)})
    with pytest.raises(
        ConversionError, match=r"model.gguf: tensor 'blk.0.ssm_a' holds 1.0, a decay must be below zero"
    ):
        read_all(path)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_export_is_the_inverse_bit_for_bit(folder: Callable[..., Path], tmp_path: Path, model_type: str) -> None:
    def as_published(tensors: Tensors) -> Tensors:
        return {
            name: each if name.endswith(("A_log", "linear_attn.norm.weight")) else each.astype(ml_dtypes.bfloat16)
            for name, each in tensors.items()
        }

    source = folder(model_type, as_published)
    convert(source, tmp_path / "made")
    export(tmp_path / "made", tmp_path / "back")
    # Qwen3-VL's text is exported as Qwen3, whose experts are published one by one.
    expected = as_published(
        published.hf_tensors(model_type, published.arrays(model_type), one_by_one=model_type == "qwen3_vl_moe")
    )
    got = load_file(tmp_path / "back" / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].tobytes() == tensor.tobytes(), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    family = exported_family(checkpoint.read_config(tmp_path / "made"))
    assert config["model_type"] == (family.text_model_type or family.model_type)
    assert "text_config" not in config
    assert_equal(read_all(tmp_path / "back"), read_all(source))


def test_a_decay_that_its_publisher_rounded_goes_back_rounded(folder: Callable[..., Path], tmp_path: Path) -> None:
    source = folder("qwen3_5", lambda each: {name: array.astype(ml_dtypes.bfloat16) for name, array in each.items()})
    made = convert(source, tmp_path / "made")
    entry = made.manifest.arrays["layers.0.attn.a_log"]
    assert (made.manifest.dtype, entry["dtype"]) == ("bfloat16", "float32")
    # By way of a second checkpoint too.
    convert(tmp_path / "made", tmp_path / "wider", dtype="float32")
    for name, others in (("made", "bfloat16"), ("wider", "float32")):
        export(tmp_path / name, tmp_path / f"back of {name}")
        tensors = load_file(tmp_path / f"back of {name}" / "model.safetensors")
        assert tensors["model.layers.0.linear_attn.A_log"].dtype.name == "bfloat16"
        assert tensors["model.layers.0.linear_attn.conv1d.weight"].dtype.name == others


@pytest.mark.parametrize("model_type", NESTED)
def test_what_is_left_out_is_said_aloud(folder: Callable[..., Path], tmp_path: Path, model_type: str) -> None:
    scales = {"model.language_model.layers.1.self_attn.k_proj.k_scale": np.ones(1, np.float32)}
    prediction = model_type.startswith("qwen3_5")

    source = folder(model_type, lambda tensors: tensors | scales)
    counts = {"tensors of the vision encoder": 2, "scales of a cache in 8 bits": 1}
    counts |= {"tensors of multi-token prediction": 1} if prediction else {}
    assert inspect(source).left_out == counts
    assert inspect(source).as_dict()["left_out"] == counts
    assert "2 tensors of the vision encoder" in inspect(source).text()
    assert inspect(source).problems == ()
    made = convert(source, tmp_path / "made")
    assert made.manifest.source["left_out"] == counts
    assert any("left out" in warning and "2 tensors of the vision encoder" in warning for warning in made.warnings)
    assert inspect(tmp_path / "made").left_out == counts
    for against in (None, source):
        verified = verify(tmp_path / "made", against)
        assert verified.ok
        assert verified.left_out == verified.as_dict()["left_out"] == counts
        assert "left out: " in str(verified)


def test_layers_are_told_by_what_they_have(folder: Callable[..., Path], gguf_file: Callable[..., Path]) -> None:
    net = {"key_heads": 2, "value_heads": 6, "key_head_dim": 8, "value_head_dim": 32}
    for path, stack in ((folder("qwen3_5_moe"), "model.language_model.layers"), (gguf_file("qwen3_5_moe"), "blk")):
        found = inspect(path)
        layers = [layer for layer in found.as_dict()["layers"] if layer["stack"] == stack]
        assert [layer["attention"] == net for layer in layers] == [True, False, True]
        assert {layer["ffw"]["shared"] for layer in layers} == {published.SHARED}
        assert "delta net, 2 key heads of 8, 6 value heads of 32" in str(found)
        assert "moe 3 experts of 24, 2 a token, one of 12 for all" in str(found)
        assert found.supported


def test_what_no_family_leaves_out_is_refused(folder: Callable[..., Path]) -> None:
    extra = np.ones(2, np.float32)
    source = folder("qwen3_vl", lambda tensors: tensors | dict.fromkeys(("model.audio.weight", "mtp.fc.weight"), extra))
    with pytest.raises(ConversionError) as caught:
        read_all(source)
    # Qwen3-VL has no multi-token prediction.
    named = {problem.split("tensor ")[1].split(" ")[0] for problem in caught.value.problems}
    assert named == {"'model.audio.weight'", "'mtp.fc.weight'"}


@pytest.mark.parametrize(
    ("model_type", "inner", "outer", "message"),
    [
        (
            "qwen3_5",
            {"tie_word_embeddings": True},
            {},
            "tie_word_embeddings is False outside of text_config and True in",
        ),
        ("qwen3_5", {}, {"hidden_size": 64}, "hidden_size is 64 outside of text_config and 32 in it"),
        (
            "qwen3_5",
            {"model_type": "qwen3_vl_text"},
            {},
            "model_type is 'qwen3_5' and that of text_config 'qwen3_vl_text'",
        ),
        ("qwen3_5", {"output_gate_type": "silu"}, {}, "output_gate_type is 'silu', only 'sigmoid' is supported"),
        ("qwen3_5", {"attn_output_gate": False}, {}, "attn_output_gate is False, only True is supported"),
        ("qwen3_5", {"mamba_ssm_dtype": "bfloat16"}, {}, "mamba_ssm_dtype is 'bfloat16', only 'float32' is supported"),
        ("qwen3_5", {"attention_bias": True}, {}, "attention_bias is True"),
        ("qwen3_5", {"layer_types": ["mamba"] * 3}, {}, "layer_types holds .*'mamba'"),
        ("qwen3_5", {"layer_types": ["linear_attention"]}, {}, "layer_types has 1 entries, num_hidden_layers is 3"),
        (
            "qwen3_5",
            {"linear_num_value_heads": 5},
            {},
            "linear_num_value_heads must be a multiple of linear_num_key_heads",
        ),
        ("qwen3_5", {"indexer_heads": 4}, {}, "indexer_heads is 4, which is not a field of 'qwen3_5'"),
        ("qwen3_5", {}, {"ngram_table": {"rows": 1}}, "ngram_table is .*which is not a field of 'qwen3_5'"),
        ("qwen3_5", {}, {"text_config": [1]}, r"text_config must be an object, got \[1\]"),
        ("qwen3_5", {}, {"model_type": "qwen4_exp"}, "model_type 'qwen4_exp' is not supported; supported: .*qwen3_5"),
        ("qwen3_5_moe", {"mlp_only_layers": [1]}, {}, "mlp_only_layers is .1., which is not a field of 'qwen3_5_moe'"),
        ("qwen3_5_moe", {"norm_topk_prob": False}, {}, "norm_topk_prob is False, only True is supported"),
        ("qwen3_5_moe", {"decoder_sparse_step": 2}, {}, "decoder_sparse_step is 2, only 1 is supported"),
        ("qwen3_vl_moe", {"norm_topk_prob": False}, {}, "norm_topk_prob is False, only True is supported"),
        ("qwen3_5", {"partial_rotary_factor": 0.5}, {}, "partial_rotary_factor is given twice and differs"),
        (
            "qwen3_next",
            {},
            {"partial_rotary_factor": 0},
            "partial_rotary_factor must be a number above 0 and at most 1",
        ),
        ("qwen2_moe", {}, {"use_sliding_window": True}, "use_sliding_window is True"),
        (
            "qwen2_moe",
            {},
            {"shared_expert_intermediate_size": 0},
            "shared_expert_intermediate_size must be a whole number",
        ),
    ],
    ids=str,
)
def test_what_matters_and_is_not_supported_is_refused_by_name(
    model_type: str, inner: dict[str, Any], outer: dict[str, Any], message: str
) -> None:
    config = dict(published.CONFIGS[model_type])
    if inner:
        config["text_config"] = {**config["text_config"], **inner}
    with pytest.raises(ConversionError, match=message):
        read_hf_config({**config, **outer}, "config.json")


@pytest.mark.parametrize(
    ("model_type", "inner", "outer"),
    [
        ("qwen3_5", {"tie_word_embeddings": False}, {"language_model_only": True}),
        ("qwen3_5", {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}, {"dtype": "bfloat16"}),
        (
            "qwen3_5",
            {"full_attention_interval": 4, "mamba_ssm_dtype": "float32", "eos_token_id": 3},
            {"eos_token_id": 4},
        ),
        ("qwen3_5", {"output_gate_type": "sigmoid", "attention_bias": False, "attention_dropout": 0.0}, {}),
        ("qwen3_5_moe", {"norm_topk_prob": True, "decoder_sparse_step": 1, "router_aux_loss_coef": 0.1}, {}),
        # The reference ties by the outer one alone, and writes the other.
        ("qwen3_vl_moe", {"tie_word_embeddings": True}, {}),
    ],
    ids=str,
)
def test_what_changes_nothing_is_accepted(model_type: str, inner: dict[str, Any], outer: dict[str, Any]) -> None:
    config = published.CONFIGS[model_type]
    changed = {**config, "text_config": {**config["text_config"], **inner}, **outer}
    assert read_hf_config(changed, "config.json") == read_hf_config(config, "config.json")


@pytest.mark.parametrize("field", ["linear_num_key_heads", "linear_value_head_dim", "linear_conv_kernel_dim"])
def test_another_geometry_than_the_tensors_have_is_refused(folder: Callable[..., Path], field: str) -> None:
    text = published.CONFIGS["qwen3_5"]["text_config"]
    changed = {**text, field: {"linear_num_key_heads": 3}.get(field, 2 * text[field])}
    with pytest.raises(ConversionError, match=r"linear_attn.*has shape .*, the config needs"):
        read_all(folder("qwen3_5", text_config=changed))


def quantised_rows() -> Iterator[tuple[str, bool]]:
    yield from {"attn.q": True, "attn.v": True, "attn.z": True, "attn.o": True, "ffw.we_gate": True}.items()
    yield from {"ffw.shared.w_up": True, "ffw.shared_gate": False, "ffw.w_router": False, "attn.a": False}.items()
    yield from {"attn.b": False, "attn.conv_v": False, "attn.a_log": False, "attn.dt_bias": False}.items()
    yield from {"attn.gamma": False, "attn_pre_gamma": False}.items()


def test_which_arrays_are_quantised(folder: Callable[..., Path], tmp_path: Path) -> None:
    made = convert(folder("qwen3_5_moe"), tmp_path / "made", quantize="int8", receipt=False)
    names = made.manifest.arrays
    for name, quantised in quantised_rows():
        assert (f"layers.0.{name}.scales" in names) == quantised, name
    assert "layers.1.attn.gate.scales" in names


def test_gguf_grids_of_q4_0_survive(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    """The columns of out_proj change places in whole heads, of which each is whole groups of 32."""
    tensors = published.gguf_tensors("qwen3_5", published.arrays("qwen3_5"))
    rows = [name for name in tensors if ".ffn_" not in name and name.endswith(("_out.weight", "_qkv.weight"))]
    path = gguf_file("qwen3_5", types=dict.fromkeys(rows, gguf.GGMLQuantizationType.Q4_0))
    exact = read_all(path)
    convert(path, tmp_path / "made", quantize="int4", receipt=False)
    got = checkpoint.read_manifest(tmp_path / "made")
    assert got.quantization is not None
    assert got.quantization.name.startswith("int4-g32")
    export(tmp_path / "made", tmp_path / "back", dtype="float32")
    back = read_all(tmp_path / "back")
    for name in ("q", "v", "o"):
        np.testing.assert_array_equal(back[f"layers.0.attn.{name}"], exact[f"layers.0.attn.{name}"], err_msg=name)


def in_8_bits(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Matrices of layers in 8 bits with a scale a block, as Qwen publishes them, and the numbers that they mean."""
    kept = ("in_proj_a", "in_proj_b", "conv1d", "norm", "mlp.gate.", "shared_expert_gate", "visual")
    random = np.random.default_rng(1)
    stored, meant = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if ".layers." not in name or tensor.ndim != 2 or any(part in name for part in kept):
            continue
        values = tensor.astype(ml_dtypes.float8_e4m3fn)
        rows, columns = (-(-size // 128) for size in tensor.shape)
        scales = random.choice([0.25, 0.5, 2.0], (rows, columns)).astype(np.float32)
        stored |= {name: values, f"{name}_scale_inv": scales}
        spread = np.repeat(np.repeat(scales, 128, 0), 128, 1)[: tensor.shape[0], : tensor.shape[1]]
        meant[name] = values.astype(np.float32) * spread
    return stored, meant


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_folders_in_8_bits(tmp_path: Path, write_hf: Callable[..., Path], model_type: str) -> None:
    tensors = published.hf_tensors(model_type, published.arrays(model_type), one_by_one=True)
    stored, meant = in_8_bits(tensors)
    config = published.CONFIGS[model_type]
    in_blocks = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
    expected = read_all(write_hf(tmp_path / "plain", config, meant))
    # Multi-token prediction is in 8 bits too, and left out with its scales.
    prediction = {"mtp.layers.0.mlp.up_proj.weight": np.ones((4, 4), ml_dtypes.float8_e4m3fn)}
    prediction |= {"mtp.layers.0.mlp.up_proj.weight_scale_inv": np.ones((1, 1), np.float32)}
    stored |= prediction if model_type in published.HYBRIDS else {}
    assert_equal(read_all(write_hf(tmp_path / "fp8", {**config, "quantization_config": in_blocks}, stored)), expected)


NETS = {
    **{"linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128},
    **{"linear_conv_kernel_dim": 4, "full_attention_interval": 4, "rms_norm_eps": 1e-6},
}
IN_TEXT_CONFIG = {
    **{"attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "dtype": "bfloat16"},
    **{"eos_token_id": 248044, "head_dim": 256, "hidden_act": "silu", "initializer_range": 0.02, "vocab_size": 248320},
    **{"mamba_ssm_dtype": "float32", "max_position_embeddings": 262144, "mlp_only_layers": [], "use_cache": True},
    **{"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "model_type": "qwen3_5_text", **NETS},
}
ROPE = {
    **{"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25},
    **{"mrope_section": [11, 11, 10], "mrope_interleaved": True},
}
AROUND = {
    **{"architectures": ["Qwen3_5ForConditionalGeneration"], "image_token_id": 248056, "video_token_id": 248057},
    **{"vision_start_token_id": 248053, "vision_end_token_id": 248054, "transformers_version": "4.57.0.dev0"},
    **{"vision_config": {"depth": 27}, "language_model_only": False},
}
# Billions of parameters, without images and multi-token prediction, by width, layers, feed-forward (or experts, their
# width and how many a token), value heads, heads of queries and of keys, and whether the head is tied.
SIZES = [
    (0.75, 1024, 24, 3584, 16, (8, 2), True),
    (1.88, 2048, 24, 6144, 16, (8, 2), True),
    (4.21, 2560, 32, 9216, 32, (16, 4), True),
    (8.95, 4096, 32, 12288, 32, (16, 4), False),
    (26.90, 5120, 64, 17408, 48, (24, 4), False),
    (34.66, 2048, 40, (256, 512, 8), 32, (16, 2), False),
    (122.1, 3072, 48, (256, 1024, 8), 64, (32, 2), False),
    (396.4, 4096, 60, (512, 1024, 10), 64, (32, 2), False),
]


def parameters(config: dict[str, Any]) -> float:
    read = read_hf_config(config, "config.json")
    return sum(info.size for info in named_leaves(abstract_weights(read)).values()) / 1e9


@pytest.mark.parametrize(("billions", "width", "layers", "ffw", "values", "heads", "tied"), SIZES)
def test_published_sizes_of_qwen3_5(
    billions: float, width: int, layers: int, ffw: Any, values: int, heads: tuple[int, int], tied: bool
) -> None:
    text = {
        **{**IN_TEXT_CONFIG, "hidden_size": width, "num_hidden_layers": layers, "linear_num_value_heads": values},
        **{"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "rope_parameters": ROPE},
    }
    if isinstance(ffw, tuple):
        text |= {"num_experts": ffw[0], "moe_intermediate_size": ffw[1], "num_experts_per_tok": ffw[2]}
        text |= {
            "shared_expert_intermediate_size": ffw[1],
            "model_type": "qwen3_5_moe_text",
            "router_aux_loss_coef": 0.001,
        }
        model_type = "qwen3_5_moe"
    else:
        text, model_type = text | {"intermediate_size": ffw}, "qwen3_5"
    config = {**AROUND, "model_type": model_type, "tie_word_embeddings": tied, "text_config": text}
    assert parameters(config) == pytest.approx(billions, rel=4e-3)
    read = read_hf_config(config, "config.json")
    assert (read.rotary_dim, read.rope_theta, len(read.layers_with("attention"))) == (64, 1e7, layers // 4)


def test_published_sizes_of_qwen3_next_and_qwen1_5_moe() -> None:
    following = {
        **{"model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 151936, **NETS},
        **{"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "linear_num_value_heads": 32},
        **{"num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512, "intermediate_size": 5120},
        **{"shared_expert_intermediate_size": 512, "norm_topk_prob": True, "decoder_sparse_step": 1},
        **{"mlp_only_layers": [], "partial_rotary_factor": 0.25, "rope_scaling": None, "rope_theta": 10000000},
        **{"use_sliding_window": False, "attention_bias": False, "tie_word_embeddings": False},
    }
    assert parameters(following) == pytest.approx(79.67, rel=1e-3)
    first = {
        **{"model_type": "qwen2_moe", "hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 151936},
        **{"num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4},
        **{"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "intermediate_size": 5632},
        **{"max_window_layers": 21, "sliding_window": 32768, "use_sliding_window": False, "norm_topk_prob": False},
        **{"decoder_sparse_step": 1, "tie_word_embeddings": False, "qkv_bias": True},
    }
    assert parameters(first) == pytest.approx(14.3, rel=3e-3)  # "14.3B parameters in total"
