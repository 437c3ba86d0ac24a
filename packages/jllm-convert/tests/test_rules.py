"""Matching tensors to arrays: everything is used once, and everything that is wrong is told at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jllm_convert.errors import ConversionError
from jllm_convert.matching.rules import Match, match_tensors
from jllm_convert.sources.huggingface.folder import SafetensorsSource
from jllm_core import abstract_weights
from jllm_core.array_info import named_leaves

Tensors = dict[str, np.ndarray]
Matched = Callable[[dict[str, Any], Tensors], list[Match]]
HfTensors = Callable[..., Tensors]
TinyConfig = Callable[..., dict[str, Any]]


@pytest.fixture
def match(tmp_path: Path, write_hf: Callable[..., Path]) -> Matched:
    def run(config: dict[str, Any], tensors: Tensors) -> list[Match]:
        source = SafetensorsSource(write_hf(tmp_path / "model", config, tensors))
        return match_tensors(source, source.config())

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen3"},
        {"model_type": "qwen3", "attention_bias": True},
        {"num_hidden_layers": 11},
    ],
    ids=str,
)
def test_every_array_gets_the_values_of_its_tensor(
    match: Matched,
    tiny_config: TinyConfig,
    hf_tensors: HfTensors,
    expected_arrays: Callable[..., Tensors],
    changes: dict[str, Any],
) -> None:
    config = tiny_config(**changes)
    tensors = hf_tensors(config)
    matches = {each.array: each.read() for each in match(config, tensors)}
    expected = expected_arrays(config, tensors)
    assert matches.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(matches[name], array, err_msg=name)


def test_matches_come_in_the_order_of_the_model(
    match: Matched, tiny_config: TinyConfig, hf_tensors: HfTensors, tmp_path: Path
) -> None:
    config = tiny_config(num_hidden_layers=11)
    matches = match(config, hf_tensors(config))
    infos = named_leaves(abstract_weights(SafetensorsSource(tmp_path / "model").config()))
    assert [each.array for each in matches] == list(infos)
    assert [(each.info.shape, each.info.logical_axes) for each in matches] == [
        (info.shape, info.logical_axes) for info in infos.values()
    ]


def test_everything_that_is_wrong_is_told_at_once(
    match: Matched, tiny_config: TinyConfig, hf_tensors: HfTensors
) -> None:
    config = tiny_config()
    tensors = hf_tensors(config)
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["lm_head.weight"]
    tensors["model.layers.1.self_attn.q_proj.weight"] = np.zeros((16, 24), np.float32)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((20, 16), np.float32)
    tensors["model.layers.1.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
    tensors["vision.weight"] = np.zeros(2, np.float32)
    with pytest.raises(ConversionError) as caught:
        match(config, tensors)
    file = "model.safetensors"
    assert sorted(caught.value.problems) == sorted(
        [
            "model: tensor 'model.layers.0.mlp.up_proj.weight' is missing (needed for layers.0.ffw.w_up, [16, 20])",
            "model: tensor 'lm_head.weight' is missing (needed for lm_head, [16, 11])",
            f"{file}: tensor 'model.layers.1.self_attn.q_proj.weight' has shape [16, 24], the config needs [24, 16]",
            f"{file}: tensor 'model.layers.2.mlp.up_proj.weight' ([20, 16]) is not part of a llama model with 2 layers",
            f"{file}: the config has no use for tensor 'model.layers.1.self_attn.q_proj.bias' ([24])",
            f"{file}: tensor 'vision.weight' ([2]) is not part of a llama model with 2 layers",
        ]
    )
    assert str(caught.value).startswith("6 problems:\n  1. ")


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_a_llama_with_head_norms_is_refused(
    match: Matched, tiny_config: TinyConfig, hf_tensors: HfTensors, name: str
) -> None:
    config = tiny_config()
    extra = {f"model.layers.0.self_attn.{name}.weight": np.ones(6, np.float32)}
    with pytest.raises(ConversionError, match=f"{name}.weight.* is not part of a llama model"):
        match(config, hf_tensors(config) | extra)


def test_a_tied_model_may_ship_the_same_head(match: Matched, tiny_config: TinyConfig, hf_tensors: HfTensors) -> None:
    config = tiny_config(tie_word_embeddings=True)
    tensors = hf_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    assert "lm_head" not in {each.array for each in match(config, tensors)}


def test_a_tied_model_that_ships_another_head_is_refused(
    match: Matched, tiny_config: TinyConfig, hf_tensors: HfTensors
) -> None:
    config = tiny_config(tie_word_embeddings=True)
    tensors = hf_tensors(config)
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    with pytest.raises(ConversionError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'; set tie"):
        match(config, tensors | {"lm_head.weight": head})
    with pytest.raises(ConversionError, match=r"'lm_head.weight' differs"):
        match(config, tensors | {"lm_head.weight": head[:-1]})


def test_an_untied_model_needs_its_head(match: Matched, tiny_config: TinyConfig, hf_tensors: HfTensors) -> None:
    tensors = hf_tensors(tiny_config(tie_word_embeddings=True))
    with pytest.raises(ConversionError, match=r"tensor 'lm_head.weight' is missing"):
        match(tiny_config(), tensors)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_computed_buffers_are_left_out(
    match: Matched, tiny_config: TinyConfig, hf_tensors: HfTensors, model_type: str
) -> None:
    config = tiny_config(model_type=model_type)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32) for i in range(2)}
    matches = match(config, hf_tensors(config) | buffers | {"model.rotary_emb.inv_freq": np.ones(3, np.float32)})
    assert len(matches) == len(hf_tensors(config))


def test_far_too_many_layers_are_one_problem(match: Matched, tiny_config: TinyConfig, hf_tensors: HfTensors) -> None:
    tensors = hf_tensors(tiny_config())
    with pytest.raises(ConversionError, match="the config has 9,000 layers") as raised:
        match(tiny_config(num_hidden_layers=9000), tensors)
    assert len(raised.value.problems) == 1
