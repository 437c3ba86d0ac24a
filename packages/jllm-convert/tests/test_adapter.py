"""Adapters of PEFT: what is merged into which array, and what is refused."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from jllm_convert import ConversionError, convert, export, load_adapter, save_adapter, verify
from jllm_convert.cli import cli
from jllm_convert.sources.huggingface.config import read_hf_config
from jllm_convert.sources.peft_adapter import AdapterSource
from jllm_core import ModelConfig, checkpoint
from jllm_core.adapters import Adapter, LowRank, abstract_adapter
from safetensors.numpy import save_file

from . import published_models

Tensors = dict[str, np.ndarray]
MakeTensors = Callable[[Mapping[str, Any]], Tensors]

# As PEFT 0.21 writes it for LoraConfig(r=2, lora_alpha=3, ...).
CONFIG: dict[str, Any] = {
    **{"alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None},
    **{"base_model_name_or_path": "someone/tiny", "bias": "none", "corda_config": None, "ensure_weight_tying": False},
    **{"eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True},
    **{"init_lora_weights": True, "kasa_config": None, "layer_replication": None, "layers_pattern": None},
    **{"layers_to_transform": None, "loftq_config": {}, "lora_alpha": 3, "lora_bias": False, "lora_dropout": 0.05},
    **{"lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None},
    **{"monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 2},
    **{"rank_pattern": {}, "revision": None, "target_modules": ["q_proj", "o_proj"], "target_parameters": None},
    **{"task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_bdlora": None, "use_dora": False},
    **{"use_qalora": False, "use_rslora": False, "velora_config": None},
}
Q, OUT, DOWN = ("model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj")


def factors(shapes: Mapping[str, tuple[int, int]], rank: int = 2, seed: int = 5) -> Tensors:
    """Factors of changes of these matrices ``[out, in]``, by PEFT's names."""
    random = np.random.default_rng(seed)
    made: Tensors = {}
    for module, (out, ins) in shapes.items():
        made[f"base_model.model.{module}.lora_A.weight"] = random.normal(size=(rank, ins)).astype(np.float32)
        made[f"base_model.model.{module}.lora_B.weight"] = random.normal(size=(out, rank)).astype(np.float32)
    return made


def save_adapter_folder(folder: Path, tensors: Tensors, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged(tensors: Tensors, adapter: Tensors, scale: float | Mapping[str, float]) -> Tensors:
    """The tensors with the changes added, as PEFT does it."""
    made = dict(tensors)
    for name in adapter:
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = adapter[name], adapter[name.replace("lora_A", "lora_B")]
            by = scale if isinstance(scale, float) else scale[module]
            made[f"{module}.weight"] = tensors[f"{module}.weight"] + np.float32(by) * (b @ a)
    return made


def arrays_of(folder: Path) -> Tensors:
    names = checkpoint.read_manifest(folder).arrays
    return {name: checkpoint.ArrayStore.open(folder / checkpoint.WEIGHTS_FOLDER, name).read() for name in names}


@pytest.fixture
def model(tmp_path: Path, tiny_config: Callable[..., dict[str, Any]], hf_tensors: MakeTensors) -> tuple[Path, Tensors]:
    """A small Llama as a Hugging Face folder, and its tensors."""
    folder, config = tmp_path / "model", tiny_config()
    tensors = hf_tensors(config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors


SHAPES = {Q: (24, 16), OUT: (16, 24), DOWN: (16, 20)}


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 1.5),
        ({"use_rslora": True}, 3 / 2**0.5),
        (
            {"alpha_pattern": {"layers.1.mlp.down_proj": 5, "proj": 99}, "rank_pattern": {"v_proj": 7}},
            {Q: 1.5, OUT: 1.5, DOWN: 2.5},
        ),
        ({"alpha_pattern": {f"^{Q}": 1, "^q_proj": 99}}, {Q: 0.5, OUT: 1.5, DOWN: 1.5}),
        # A dot is any letter, as in every regular expression, and one behind a backslash is a dot.
        ({"alpha_pattern": {"q.proj": 1, r"0\.self_attn\.o_proj": 2, r"down\.proj": 9}}, {Q: 0.5, OUT: 1.0, DOWN: 1.5}),
        ({"fan_in_fan_out": True}, 1.5),
    ],
    ids=["plain", "rslora", "patterns", "whole-names", "dots", "fan-in-fan-out"],
)
def test_changes_are_merged_into_the_arrays_they_name(
    changes: dict[str, Any],
    scale: Any,
    model: tuple[Path, Tensors],
    tmp_path: Path,
    tiny_config: Callable[..., dict[str, Any]],
    expected_arrays: Callable[..., Tensors],
) -> None:
    folder, tensors = model
    adapter = factors(SHAPES)
    made = convert(folder, tmp_path / "out", adapter=save_adapter_folder(tmp_path / "lora", adapter, **changes))
    expected = expected_arrays(tiny_config(), merged(tensors, adapter, scale))
    found = arrays_of(tmp_path / "out")
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-5, err_msg=name)
    described = made.manifest.source["adapter"]
    assert isinstance(described, dict)
    assert (described["name"], described["base"], described["matrices"]) == ("lora", "someone/tiny", 3)


def test_a_module_may_have_a_rank_of_its_own(model: tuple[Path, Tensors], tmp_path: Path) -> None:
    adapter = {**factors({Q: SHAPES[Q]}), **factors({DOWN: SHAPES[DOWN]}, rank=6)}
    folder = save_adapter_folder(tmp_path / "lora", adapter, rank_pattern={"down_proj": 6})
    convert(model[0], tmp_path / "out", adapter=folder)
    expected = merged(model[1], adapter, {Q: 1.5, DOWN: 0.5})[f"{DOWN}.weight"].T
    np.testing.assert_allclose(arrays_of(tmp_path / "out")["layers.1.ffw.w_down"], expected, atol=1e-5)


def test_the_sum_is_rounded_once(model: tuple[Path, Tensors], tmp_path: Path) -> None:
    folder, tensors = model
    half = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    save_file(half, folder / "model.safetensors")
    adapter = factors({DOWN: SHAPES[DOWN]})
    made = convert(folder, tmp_path / "out", adapter=save_adapter_folder(tmp_path / "lora", adapter))
    assert made.manifest.dtype == "bfloat16"
    exact = merged({name: each.astype(np.float32) for name, each in half.items()}, adapter, 1.5)
    found = arrays_of(tmp_path / "out")["layers.1.ffw.w_down"]
    np.testing.assert_array_equal(found, exact[f"{DOWN}.weight"].T.astype(ml_dtypes.bfloat16))
    # The publisher's type is not promised on the way back: the sum is of no such type.
    assert "dtype" not in made.manifest.source
    exported = export(tmp_path / "out", tmp_path / "hf")
    assert exported.dtype == "bfloat16"


@pytest.mark.parametrize("rank", [1, 3, 64, 300])
def test_a_change_is_the_same_number_in_whatever_box_and_order(rank: int, tmp_path: Path) -> None:
    # Two lengths that no tile divides; matrix products of libraries differ from one shape to the next.
    adapter = factors({DOWN: (259, 517)}, rank=rank)
    a, b = (f"base_model.model.{DOWN}.lora_{part}.weight" for part in "AB")
    adapter[b][7] *= np.float32(1e-30)  # numbers of any size are kept as well
    source = AdapterSource(save_adapter_folder(tmp_path / "lora", adapter, r=rank, lora_alpha=3))
    change = source.changes[f"{DOWN}.weight"]
    found = change.read()
    exact = adapter[b].astype(np.float64) @ adapter[a].astype(np.float64) * 3 / rank
    assert np.all(np.abs(found - exact).max(axis=1) < 2e-6 * np.abs(exact).max(axis=1))
    for box in ((slice(5, 6), slice(0, 517)), (slice(0, 259), slice(516, 517)), (slice(2, 259), slice(31, 400))):
        np.testing.assert_array_equal(change.read(box), found[box])
    backwards = {a: np.ascontiguousarray(adapter[a][::-1]), b: np.ascontiguousarray(adapter[b][:, ::-1])}
    other = AdapterSource(save_adapter_folder(tmp_path / "other", backwards, r=rank, lora_alpha=3))
    np.testing.assert_array_equal(other.changes[f"{DOWN}.weight"].read(), found)


def test_a_checkpoint_takes_an_adapter_and_so_does_quantising(model: tuple[Path, Tensors], tmp_path: Path) -> None:
    lora = save_adapter_folder(tmp_path / "lora", factors(SHAPES))
    convert(model[0], tmp_path / "direct", adapter=lora)
    convert(model[0], tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "later", adapter=lora)
    direct, later = arrays_of(tmp_path / "direct"), arrays_of(tmp_path / "later")
    for name, array in direct.items():
        np.testing.assert_array_equal(later[name], array, err_msg=name)
    convert(model[0], tmp_path / "few", adapter=lora, quantize="int8", receipt=False)
    values = arrays_of(tmp_path / "few")["layers.1.attn.q.values"]
    scales = arrays_of(tmp_path / "few")["layers.1.attn.q.scales"]
    np.testing.assert_allclose(values * scales, direct["layers.1.attn.q"], atol=scales.max())


def test_fused_tensors_and_single_experts_are_changed_where_they_lie(tmp_path: Path) -> None:
    name, shape = "qwen3_next", published_models
    made = shape.arrays(name)
    tensors = shape.hf_tensors(name, made, one_by_one=True)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape.CONFIGS[name]))
    save_file({key: np.ascontiguousarray(each) for key, each in tensors.items()}, folder / "model.safetensors")
    modules = [
        *("model.layers.1.self_attn.q_proj", "model.layers.0.linear_attn.in_proj_qkvz"),
        *("model.layers.2.mlp.experts.1.gate_proj", "model.layers.2.mlp.shared_expert.down_proj"),
    ]
    adapter = factors({module: tensors[f"{module}.weight"].shape for module in modules})  # type: ignore[misc]
    convert(folder, tmp_path / "merged", adapter=save_adapter_folder(tmp_path / "lora", adapter))
    # The same by merging first.
    before = {key: np.ascontiguousarray(each) for key, each in merged(tensors, adapter, 1.5).items()}
    save_file(before, folder / "model.safetensors")
    convert(folder, tmp_path / "expected")
    found, expected = arrays_of(tmp_path / "merged"), arrays_of(tmp_path / "expected")
    for key, array in expected.items():
        np.testing.assert_allclose(found[key], array, atol=1e-5, err_msg=key)


def test_names_of_composite_models_are_those_of_their_text(tmp_path: Path) -> None:
    for prefix in ("model.language_model.", "language_model.model."):
        module = f"{prefix}layers.0.mlp.up_proj"
        source = AdapterSource(save_adapter_folder(tmp_path / prefix, factors({module: (4, 3)})))
        assert list(source.changes) == ["model.layers.0.mlp.up_proj.weight"]


def test_verify_and_exist_ok_know_the_adapter(model: tuple[Path, Tensors], tmp_path: Path) -> None:
    lora = save_adapter_folder(tmp_path / "lora", factors(SHAPES))
    other = save_adapter_folder(tmp_path / "other", factors(SHAPES, seed=6), lora_alpha=4)
    out = tmp_path / "out"
    convert(model[0], out, adapter=lora)
    assert not convert(model[0], out, adapter=lora, exist_ok=True).is_new
    for another in (None, other):
        with pytest.raises(ConversionError, match=r"is another conversion: .*with another adapter"):
            convert(model[0], out, adapter=another, exist_ok=True)
    assert verify(out, model[0], adapter=lora).ok
    assert not verify(out, model[0], adapter=other).ok
    with pytest.raises(ConversionError, match="the checkpoint has the adapter lora merged; name its folder too"):
        verify(out, model[0])
    with pytest.raises(ConversionError, match="say what to compare with"):
        verify(out, adapter=lora)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; LORA is"),
        ({"use_dora": True}, "use_dora is True, which is not supported: DoRA divides"),
        ({"bias": "lora_only"}, "bias is 'lora_only', which is not supported: biases were trained too"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is .* whole modules were trained"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is"),
        ({"trainable_token_indices": [0]}, "trainable_token_indices is"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters is"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"shiny_new_maths": 0}, "shiny_new_maths is 0, which is not supported: this version does not know it"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the model's own weights"),
        ({"r": 0}, "r must be a whole number from 1 up, got 0"),
        ({"r": True}, "r must be a whole number from 1 up, got True"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number, got 1000"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number, got nan"),
        ({"lora_alpha": "3"}, "lora_alpha must be a number, got '3'"),
        ({"rank_pattern": {"(a+)+$": 2}}, r"rank_pattern has the pattern .* only names of modules are supported"),
        ({"rank_pattern": {"q_proj": 0}}, "must be a rank, got 0"),
        ({"alpha_pattern": []}, None),
        ({"rank_pattern": {"q_proj": 3}}, "the factors of .*q_proj.* says that their rank is 3"),
    ],
    ids=str,
)
def test_fields_that_change_the_maths_are_honoured_or_refused(
    changes: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    folder = save_adapter_folder(tmp_path / "lora", factors({Q: SHAPES[Q]}), **changes)
    if message is None:
        assert len(AdapterSource(folder).changes) == 1
        return
    with pytest.raises(ConversionError, match=message):
        AdapterSource(folder)


def test_all_problems_of_the_fields_are_told_at_once(tmp_path: Path) -> None:
    folder = save_adapter_folder(tmp_path / "lora", factors({Q: SHAPES[Q]}), use_dora=True, bias="all", r=-1)
    with pytest.raises(ConversionError) as error:
        AdapterSource(folder)
    assert len(error.value.problems) == 3


def test_tensors_must_be_factors_in_pairs(tmp_path: Path) -> None:
    tensors = factors({Q: SHAPES[Q], OUT: SHAPES[OUT]})
    del tensors[f"base_model.model.{Q}.lora_B.weight"]
    tensors["base_model.model.lm_head.weight"] = np.zeros((2, 2), np.float32)
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = np.zeros((2, 2), np.float32)
    tensors[f"{DOWN}.lora_A.weight"] = np.zeros((2, 2), np.float32)
    tensors["base_model.model.lm_head.base_layer.weight"] = np.zeros((2, 2), np.float32)
    with pytest.raises(ConversionError) as error:
        AdapterSource(save_adapter_folder(tmp_path / "lora", tensors))
    text = str(error.value)
    assert len(error.value.problems) == 5
    assert "base_layer.weight' is a matrix of the model itself" in text
    for part in (f"lora_B of '{Q}' is missing", "lm_head.weight", "lora_embedding_A", f"'{DOWN}.lora_A.weight'"):
        assert part in text


def test_changes_that_the_model_has_no_place_for_are_all_named(model: tuple[Path, Tensors], tmp_path: Path) -> None:
    shapes = {
        **{"model.layers.0.mlp.up_proj": (20, 15), "model.layers.2.mlp.up_proj": (20, 16)},
        **{"model.layers.0.self_attn.qkv_proj": (40, 16), "model.layers.0.input_layernorm": (16, 1)},
    }
    lora = save_adapter_folder(tmp_path / "lora", factors(shapes))
    with pytest.raises(ConversionError) as error:
        convert(model[0], tmp_path / "out", adapter=lora)
    assert len(error.value.problems) == 4
    assert "[20, 15], model.layers.0.mlp.up_proj.weight of the model [20, 16]" in str(error.value)
    assert "model.layers.2.mlp.up_proj.weight, which is not part of a llama model with 2 layers" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_nan_in_an_adapter_is_found(model: tuple[Path, Tensors], tmp_path: Path) -> None:
    adapter = factors({DOWN: SHAPES[DOWN]})
    adapter[f"base_model.model.{DOWN}.lora_B.weight"][3, 1] = np.nan
    lora = save_adapter_folder(tmp_path / "lora", adapter)
    with pytest.raises(ConversionError, match=r"NaN or infinite: .*down_proj.lora_B.* in adapter_model.safetensors"):
        convert(model[0], tmp_path / "out", adapter=lora)


def test_what_is_no_adapter_is_refused_with_advice(model: tuple[Path, Tensors], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"nowhere is not a folder; an adapter is one with adapter_config\.json"):
        AdapterSource(tmp_path / "nowhere")
    with pytest.raises(ConversionError, match=r"is not an adapter: it has no adapter_config\.json"):
        AdapterSource(model[0])
    folder = save_adapter_folder(tmp_path / "lora", factors({Q: SHAPES[Q]}))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ConversionError, match=r"adapter_model\.bin can run any code when loaded"):
        AdapterSource(folder)


def test_the_command_merges_verifies_and_ends_with_2_on_bad_input(model: tuple[Path, Tensors], tmp_path: Path) -> None:
    lora, out = save_adapter_folder(tmp_path / "lora", factors(SHAPES)), str(tmp_path / "out")
    assert CliRunner().invoke(cli, ["convert", str(model[0]), out, "--adapter", str(lora)]).exit_code == 0
    against = ["verify", out, "--against", str(model[0])]
    assert CliRunner().invoke(cli, [*against, "--adapter", str(lora)]).exit_code == 0
    failed = CliRunner().invoke(cli, against)
    assert isinstance(failed.exception, ConversionError)  # which ``main`` ends with code 2


def trained(config: ModelConfig, targets: Any, rank: int = 3, **options: Any) -> Adapter:
    """An adapter whose factors are both random, made without compiling anything."""
    random = np.random.default_rng(0)
    described = abstract_adapter(config, rank, 6.0, targets, **options)
    factors = {
        name: LowRank(*(random.normal(size=each.shape).astype(np.float32) for each in (part.a, part.b)))
        for name, part in described.factors.items()
    }
    return Adapter(factors, described.alpha, described.rslora)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_saved_adapter_is_merged_as_it_was_trained(rslora: bool, model: tuple[Path, Tensors], tmp_path: Path) -> None:
    plain = convert(model[0], tmp_path / "plain")
    targets = ("q", "k", "v", "o", "w_gate", "w_up", "w_down")
    adapter = trained(plain.config, targets, layers=[1], rslora=rslora)
    lora = save_adapter(adapter, tmp_path / "lora", plain.config, base="someone/tiny")
    convert(model[0], tmp_path / "out", adapter=lora)
    assert_merged(tmp_path / "out", adapter)
    fields = json.loads((lora / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["use_rslora"]) == (3, 6, rslora)
    assert (fields["base_model_name_or_path"], len(fields["target_modules"])) == ("someone/tiny", 7)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_saved_adapter_is_loaded_as_it_was(rslora: bool, model: tuple[Path, Tensors], tmp_path: Path) -> None:
    config = convert(model[0], tmp_path / "plain").config
    adapter = trained(config, None, rslora=rslora)
    assert_same_factors(load_adapter(save_adapter(adapter, tmp_path / "lora", config), config), adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"down_proj": 5, "o_proj": 0}},
        {"lora_alpha": 0, "alpha_pattern": {"q_proj": 3}},
    ],
    ids=["plain", "rslora", "alphas", "no-alpha"],
)
def test_a_loaded_adapter_changes_the_weights_as_a_merged_one(
    changes: dict[str, Any], model: tuple[Path, Tensors], tmp_path: Path
) -> None:
    shapes = {Q: (24, 16), OUT: (16, 24), DOWN: (16, 20)}
    lora = save_adapter_folder(tmp_path / "lora", factors(shapes), **changes)
    config = convert(model[0], tmp_path / "plain").config
    convert(model[0], tmp_path / "merged", adapter=lora)
    adapter = load_adapter(lora, config)
    assert set(adapter.factors) == {"layers.0.attn.o", "layers.1.attn.q", "layers.1.ffw.w_down"}
    assert_merged(tmp_path / "merged", adapter)


def test_a_loaded_adapter_has_the_ranks_of_its_modules(model: tuple[Path, Tensors], tmp_path: Path) -> None:
    tensors = {**factors({Q: (24, 16)}, rank=2), **factors({OUT: (16, 24)}, rank=4)}
    config = convert(model[0], tmp_path / "plain").config
    adapter = load_adapter(save_adapter_folder(tmp_path / "lora", tensors, rank_pattern={"o_proj": 4}), config)
    assert {name: (part.rank, adapter.scale(name)) for name, part in adapter.factors.items()} == {
        "layers.1.attn.q": (2, 1.5),
        "layers.0.attn.o": (4, 0.75),
    }


def test_what_cannot_be_loaded_is_named(model: tuple[Path, Tensors], tmp_path: Path) -> None:
    config = convert(model[0], tmp_path / "plain").config
    shapes = {Q: (24, 16), "model.layers.9.mlp.up_proj": (20, 16), "lm_head": (32, 16), DOWN: (16, 16)}
    with pytest.raises(ConversionError) as error:
        load_adapter(save_adapter_folder(tmp_path / "lora", factors(shapes)), config)
    problems = "\n".join(sorted(error.value.problems))
    assert "the change of model.layers.1.mlp.down_proj has shape [16, 16], the matrix of the model [16, 20]" in problems
    for module in ("model.layers.9.mlp.up_proj", "lm_head"):
        assert f"{module} is no matrix of its own in a llama model with 2 layers" in problems
    assert len(error.value.problems) == 3
    with pytest.raises(ConversionError, match="is not an adapter: it has no adapter_config"):
        load_adapter(model[0], config)


def test_only_an_adapter_is_replaced(model: tuple[Path, Tensors], tmp_path: Path) -> None:
    config = convert(model[0], tmp_path / "plain").config
    adapter, folder = trained(config, ["q"]), tmp_path / "lora"
    save_adapter(adapter, folder, config)
    with pytest.raises(ConversionError, match="exists; choose another name, or replace it with overwrite"):
        save_adapter(adapter, folder, config)
    save_adapter(adapter, folder, config, overwrite=True)
    with pytest.raises(ConversionError, match="exists and is not an adapter"):
        save_adapter(adapter, model[0], config, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "model", "plain"]


def hybrid(name: str, folder: Path) -> ModelConfig:
    """A model with delta nets as a Hugging Face folder, and its config."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(published_models.CONFIGS[name]))
    tensors = published_models.hf_tensors(name, published_models.arrays(name), one_by_one=True)
    save_file({key: np.ascontiguousarray(each) for key, each in tensors.items()}, folder / "model.safetensors")
    return convert(folder, folder.parent / "plain").config


def assert_same_factors(found: Adapter, expected: Adapter) -> None:
    assert (found.alpha, found.rslora, set(found.factors)) == (expected.alpha, expected.rslora, set(expected.factors))
    for name, part in expected.factors.items():
        np.testing.assert_array_equal(found.factors[name].a, part.a, err_msg=name)
        np.testing.assert_array_equal(found.factors[name].b, part.b, err_msg=name)


def assert_merged(folder: Path, adapter: Adapter) -> None:
    """That a checkpoint is that of ``plain`` beside it with the adapter's changes, and with no other."""
    before, after = arrays_of(folder.parent / "plain"), arrays_of(folder)
    for name, array in before.items():
        part, expected = adapter.factors.get(name), array
        if part is not None:
            expected = array + adapter.scale(name) * np.tensordot(part.a, part.b, axes=1)
        np.testing.assert_allclose(after[name], expected, atol=1e-5, err_msg=name)


HYBRIDS = ["qwen3_next", "qwen3_5", "qwen3_5_moe"]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [None, ("q", "v"), ("gate", "z", "o", "w_up")], ids=str)
@pytest.mark.parametrize("name", HYBRIDS)
def test_matrices_that_share_one_are_saved_as_a_module_and_loaded_apart(
    name: str, targets: tuple[str, ...] | None, rslora: bool, tmp_path: Path
) -> None:
    config = hybrid(name, tmp_path / "model")
    adapter = trained(config, targets, rslora=rslora)
    assert {each.rpartition(".")[2] for each in adapter.factors} >= set(targets or ("q", "k", "v", "gate", "z"))
    lora = save_adapter(adapter, tmp_path / "lora", config)
    assert_same_factors(load_adapter(lora, config), adapter)
    convert(tmp_path / "model", tmp_path / "merged", adapter=lora)
    assert_merged(tmp_path / "merged", adapter)


@pytest.mark.parametrize("rslora", [False, True])
def test_matrices_of_several_ranks_are_saved(rslora: bool, tmp_path: Path) -> None:
    config = hybrid("qwen3_5", tmp_path / "model")
    made = [
        trained(config, targets, rank=rank, rslora=rslora) for rank, targets in ((2, ("q", "o")), (3, ("k", "gate")))
    ]
    adapter = Adapter({**made[0].factors, **made[1].factors}, 6.0, rslora)
    lora = save_adapter(adapter, tmp_path / "lora", config)
    convert(tmp_path / "model", tmp_path / "merged", adapter=lora)
    assert_merged(tmp_path / "merged", adapter)
    again = load_adapter(lora, config)
    assert {key: part.rank for key, part in again.factors.items()} == {
        key: part.rank for key, part in adapter.factors.items()
    }
    for key, part in adapter.factors.items():
        np.testing.assert_allclose(again.factors[key].b, part.b, rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_module_that_is_several_matrices_is_loaded_into_each(name: str, tmp_path: Path) -> None:
    config = hybrid(name, tmp_path / "model")
    fused = "in_proj_qkvz" if name == "qwen3_next" else "in_proj_qkv"
    arrays = [f"layers.0.attn.{each}" for each in fused.removeprefix("in_proj_")]
    described = abstract_adapter(config, 1, 1.0, targets=None).factors
    out = sum(int(np.prod(described[each].b.shape[1:])) for each in arrays)
    tensors = factors({f"model.layers.0.linear_attn.{fused}": (out, config.hidden_size)})
    lora = save_adapter_folder(tmp_path / "lora", tensors)
    adapter = load_adapter(lora, config)
    assert sorted(adapter.factors) == sorted(arrays)
    convert(tmp_path / "model", tmp_path / "merged", adapter=lora)
    assert_merged(tmp_path / "merged", adapter)
    # One that has learnt nothing yet is trained as a whole.
    for key in tensors:
        tensors[key] *= "lora_A" in key
    new = load_adapter(save_adapter_folder(tmp_path / "new", tensors), config)
    assert {key: part.rank for key, part in new.factors.items()} == dict.fromkeys(arrays, 2)


def test_what_the_model_has_not_is_not_saved(tmp_path: Path) -> None:
    config = read_hf_config(published_models.CONFIGS["qwen3_next"], "config.json")
    adapter = trained(config, ["q"])
    part = next(iter(adapter.factors.values()))
    with pytest.raises(ConversionError) as error:
        save_adapter(Adapter({"layers.0.ffw.we_up": part, "layers.9.attn.q": part}, 1.0), tmp_path / "lora", config)
    assert [problem.split(" ")[0] for problem in error.value.problems] == ["layers.0.ffw.we_up", "layers.9.attn.q"]
    assert "is no matrix that an adapter changes in a qwen3_next model with" in error.value.problems[0]
    assert not (tmp_path / "lora").exists()
    save_adapter(trained(config, ["o", "w_up"]), tmp_path / "lora", config)
    assert "model.layers.0.mlp.shared_expert.up_proj.weight" in AdapterSource(tmp_path / "lora").changes


def test_what_no_training_should_leave_is_not_saved(model: tuple[Path, Tensors], tmp_path: Path) -> None:
    config = convert(model[0], tmp_path / "plain").config
    adapter = trained(config, ["q"])
    next(iter(adapter.factors.values())).b[0] = np.nan
    with pytest.raises(ConversionError, match=r"the factors of layers\.0\.attn\.q are NaN or infinite"):
        save_adapter(adapter, tmp_path / "lora", config)
    wider = replace(config, hidden_size=2 * config.hidden_size)
    with pytest.raises(ConversionError, match=r"the change of layers\.0\.attn\.q has shape .*another model"):
        save_adapter(trained(wider, ["q"]), tmp_path / "lora", config)
    for alpha in (1e300, float("nan")):
        with pytest.raises(ConversionError, match="an alpha below a billion, got"):
            save_adapter(Adapter(trained(config, ["q"]).factors, alpha), tmp_path / "lora", config)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("alpha", [2.5, 8.0])
def test_an_alpha_and_a_base_in_a_folder_are_saved(alpha: float, model: tuple[Path, Tensors], tmp_path: Path) -> None:
    config = convert(model[0], tmp_path / "plain").config
    folder = save_adapter(
        Adapter(trained(config, ["q"]).factors, alpha), tmp_path / "lora", config, base=tmp_path / "plain"
    )
    assert load_adapter(folder, config).alpha == alpha
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(tmp_path / "plain")
    assert isinstance(fields["lora_alpha"], int) == (alpha == 8.0)


def test_an_adapter_without_matrices_is_not_saved(model: tuple[Path, Tensors], tmp_path: Path) -> None:
    config = convert(model[0], tmp_path / "plain").config
    with pytest.raises(ConversionError, match="factors of at least one matrix, got none"):
        save_adapter(Adapter({}, 1.0), tmp_path / "lora", config)
