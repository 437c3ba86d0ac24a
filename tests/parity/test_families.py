"""Random weights of every supported family: the logits of transformers, within 1e-4, with and without the cache."""

import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jllm_convert import convert
from jllm_core import checkpoint
from jllm_core.model import forward
from jllm_runtime import SamplingParams, generate
from jllm_runtime.cache.contiguous import ContiguousCache, cache_info
from jllm_runtime.programs import contiguous_batch
from safetensors.numpy import load_file, save_file
from transformers import (
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

TOLERANCE = 1e-4
SIZES = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
# Trained on 64 tokens: the tests' texts are longer.
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
WINDOW = {"use_sliding_window": True, "sliding_window": 24}
EXPERTS = {**SIZES, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-head-dim": LlamaConfig(**SIZES, head_dim=12),
    "llama-attention-bias": LlamaConfig(**SIZES, attention_bias=True),
    "llama-mlp-bias": LlamaConfig(**SIZES, mlp_bias=True),
    "llama-no-gqa": LlamaConfig(**{**SIZES, "num_key_value_heads": 6}),
    "llama3-rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "llama-linear-rope": LlamaConfig(**SIZES, rope_parameters=LINEAR_ROPE),
    "llama-dynamic-rope": LlamaConfig(**{**SIZES, "max_position_embeddings": 64}, rope_parameters=DYNAMIC_ROPE),
    "mistral": MistralConfig(**SIZES, sliding_window=24),
    "mistral-no-window": MistralConfig(**SIZES, sliding_window=None),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layer_interval=2, pad_token_id=0),
    "smollm3-windows": SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1], pad_token_id=0, **WINDOW),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-windows": Qwen2Config(**SIZES, max_window_layers=1, **WINDOW),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False),
    "qwen3-tied": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "qwen3-attention-bias": Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
    "qwen3-yarn": Qwen3Config(**{**SIZES, "max_position_embeddings": 64}, head_dim=16, rope_parameters=YARN),
    "qwen3-yarn-exact-band": Qwen3Config(**SIZES, head_dim=16, rope_parameters={**YARN, "truncate": False}),
    "qwen3-moe": Qwen3MoeConfig(**EXPERTS, norm_topk_prob=True),
    "qwen3-moe-not-normalised": Qwen3MoeConfig(**EXPERTS, norm_topk_prob=False),
    "qwen3-moe-every-other-layer": Qwen3MoeConfig(**EXPERTS, norm_topk_prob=True, decoder_sparse_step=2),
    "qwen3-moe-but-one-layer": Qwen3MoeConfig(**EXPERTS, norm_topk_prob=True, mlp_only_layers=[1]),
    "qwen3-moe-windows": Qwen3MoeConfig(**EXPERTS, **WINDOW),
}


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, SIZES["vocab_size"], shape)


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def pair(request: pytest.FixtureRequest, make_pair: Callable):
    return make_pair(CONFIGS[request.param])


def test_prefill_logits(pair):
    tokens = random_tokens(2, 130)
    assert np.abs(pair.model.logits(tokens) - pair.reference_logits(tokens)).max() < TOLERANCE


def test_hidden_states_and_attention_probabilities(pair):
    layers, tokens = range(pair.model.config.num_layers), random_tokens(2, 130)
    _, found = pair.model.inspect(tokens, hidden=layers, attention=layers)
    states, attentions = pair.reference_insides(tokens)
    assert (len(states), len(attentions)) == (len(layers) - 1, len(layers))
    for number, expected in enumerate(states):
        assert np.abs(found.hidden[number] - expected).max() < TOLERANCE, f"after layer {number}"
    for number, expected in enumerate(attentions):
        assert np.abs(found.attention[number] - expected).max() < TOLERANCE, f"attention of layer {number}"


def test_twenty_decode_steps_through_the_cache(pair):
    config, weights = pair.model.config, pair.model.weights
    # Long enough for the windows and the scaled rotations to matter.
    prompt, new = random_tokens(1, 60, seed=1), random_tokens(1, 20, seed=2)
    info = cache_info(config, 1, 128, jnp.float32)
    arrays = [jnp.zeros(info.shape, info.dtype) for _ in range(config.num_layers)]
    step = jax.jit(forward, static_argnames="config")
    _, cache = step(prompt, np.arange(60)[None], weights, config, ContiguousCache(arrays, arrays))
    for number, expected in enumerate(pair.reference_steps(prompt, new)):
        logits, cache = step(new[:, number : number + 1], np.array([[60 + number]]), weights, config, cache)
        assert np.abs(logits[0, 0] - expected).max() < TOLERANCE, f"step {number}"


def test_greedy_tokens_of_prompts_of_unequal_length(pair):
    prompts = [random_tokens(length, seed=length).tolist() for length in (3, 70, 128, 1)]
    outputs = generate(pair.model, prompts, SamplingParams(max_tokens=20, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == pair.reference_greedy(prompt, 20)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "qwen3-moe"])
def test_16_bits_are_no_further_from_float32_than_twice_the_reference(make_pair: Callable, name: str, dtype: str):
    pair = make_pair(CONFIGS[name], dtype=dtype)
    tokens = random_tokens(4, 64)
    exact = pair.reference_logits(tokens)
    ours = np.abs(np.asarray(pair.model.logits(tokens)) - exact)
    theirs = np.abs(
        type(pair)(pair.reference.to(getattr(torch, dtype)), pair.model, pair.folder).reference_logits(tokens) - exact
    )
    assert pair.model.weights.embedding.dtype == dtype
    assert ours.mean() <= 2 * theirs.mean()
    assert ours.max() <= 2 * theirs.max()


@pytest.mark.parametrize("name", ["llama-dynamic-rope", "smollm3-windows", "qwen3-moe"])
def test_the_cached_steps_are_compiled_once_for_any_mix(make_pair: Callable, name: str):
    """Lengths, limits and sampling parameters are arrays: no request makes a step compile again."""
    pair = make_pair(CONFIGS[name])
    prompts = [random_tokens(5).tolist(), random_tokens(9).tolist()]
    generate(pair.model, prompts, SamplingParams(max_tokens=3))
    before = contiguous_batch.decode._cache_size(), contiguous_batch.prefill._cache_size()
    mix = [SamplingParams(max_tokens=7, temperature=0.5, top_k=5, seed=1), SamplingParams(max_tokens=2, top_p=0.5)]
    generate(pair.model, prompts[::-1], mix)
    assert (contiguous_batch.decode._cache_size(), contiguous_batch.prefill._cache_size()) == before


def test_experts_in_one_tensor_are_those_in_many(make_pair: Callable, tmp_path):
    """save_pretrained writes an expert a tensor; the parameters as they are in memory hold all experts at once."""
    pair = make_pair(CONFIGS["qwen3-moe"])
    state = {name: tensor.numpy() for name, tensor in pair.reference.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    assert state.keys() != load_file(pair.folder / "hf" / "model.safetensors").keys()
    shutil.copytree(pair.folder / "hf", tmp_path / "hf")
    save_file(state, tmp_path / "hf" / "model.safetensors")
    stacked = convert(tmp_path / "hf", tmp_path / "jllm")
    assert stacked.manifest.arrays == checkpoint.read_manifest(pair.folder / "jllm").arrays
