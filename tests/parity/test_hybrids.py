"""Hybrids of delta nets and attention, random weights: the logits of transformers, within 1e-4, and its tokens."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jllm_core.backends.base import XLA
from jllm_core.model import forward
from jllm_runtime import SamplingParams, generate
from jllm_runtime.cache.contiguous import cache_info, zero_cache
from jllm_runtime.errors import RequestError
from transformers import PretrainedConfig, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig

TOLERANCE = 1e-4
SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "tie_word_embeddings": False,
}
DENSE = {**SIZES, "intermediate_size": 88}
EXPERTS = {
    **SIZES,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.5,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3.5": Qwen3_5TextConfig(**DENSE),
    "qwen3.5-tied": Qwen3_5TextConfig(**{**DENSE, "tie_word_embeddings": True}),
    "qwen3.5-a-key-head-each": Qwen3_5TextConfig(**{**DENSE, "linear_num_key_heads": 4}),
    "qwen3.5-attention-first": Qwen3_5TextConfig(
        **DENSE, layer_types=["full_attention", "linear_attention", "linear_attention", "full_attention"]
    ),
    "qwen3.5-attention-alone": Qwen3_5TextConfig(**DENSE, layer_types=["full_attention"] * 4),
    "qwen3.5-delta-nets-alone": Qwen3_5TextConfig(**DENSE, layer_types=["linear_attention"] * 4),
    "qwen3.5-yarn": Qwen3_5TextConfig(**{**DENSE, "max_position_embeddings": 64}, rope_parameters=YARN),
    "qwen3.5-conv-2": Qwen3_5TextConfig(**DENSE, linear_conv_kernel_dim=2),
    "qwen3.5-moe": Qwen3_5MoeTextConfig(**EXPERTS),
    "qwen3-next": Qwen3NextConfig(**EXPERTS),
    "qwen3-next-not-normalised": Qwen3NextConfig(**EXPERTS, norm_topk_prob=False),
}


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, SIZES["vocab_size"], shape)


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def pair(request: pytest.FixtureRequest, make_hybrid: Callable):
    return make_hybrid(CONFIGS[request.param])


def test_prefill_logits(pair):
    tokens = random_tokens(2, 130)
    assert np.abs(np.asarray(pair.model.logits(tokens)) - pair.reference_logits(tokens)).max() < TOLERANCE


# Below, at and over the 64 tokens of a chunk, and the 4 of a convolution.
@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 200])
def test_prefill_logits_of_every_length(make_hybrid: Callable, length: int):
    pair, tokens = make_hybrid(CONFIGS["qwen3.5"]), random_tokens(2, length)
    assert np.abs(np.asarray(pair.model.logits(tokens)) - pair.reference_logits(tokens)).max() < TOLERANCE


def test_hidden_states_and_attention_probabilities(make_hybrid: Callable):
    pair = make_hybrid(CONFIGS["qwen3.5-attention-first"])
    with_attention, tokens = pair.model.config.layers_with("attention"), random_tokens(2, 130)
    _, found = pair.model.inspect(tokens, hidden=range(4), attention=with_attention)
    states, attentions = pair.reference_insides(tokens)
    assert (len(states), len(attentions)) == (3, 2)
    for number, expected in enumerate(states):
        assert np.abs(found.hidden[number] - expected).max() < TOLERANCE, f"after layer {number}"
    for number, expected in zip(with_attention, attentions, strict=True):
        assert np.abs(found.attention[number] - expected).max() < TOLERANCE, f"attention of layer {number}"
    with pytest.raises(RequestError, match=r"layer 1 is a delta net and has no attention to inspect; .* are 0, 3"):
        pair.model.inspect(tokens, attention=[1])


def test_twenty_decode_steps_through_the_cache(pair):
    config, weights = pair.model.config, pair.model.weights
    prompt, new = random_tokens(1, 60, seed=1), random_tokens(1, 20, seed=2)
    info = cache_info(config, 1, 128, jnp.float32)
    step = jax.jit(forward, static_argnames="config")
    cache = zero_cache(info.shape, info.dtype, config, XLA())
    _, cache = step(prompt, np.arange(60)[None], weights, config, cache)
    if config.layers_with("attention"):
        expected = pair.reference_steps(prompt, new)
    else:
        # transformers' own cache takes no model without attention.
        expected = pair.reference_logits(np.concatenate([prompt, new], axis=1))[0, 60:]
    for number, logits_then in enumerate(expected):
        logits, cache = step(new[:, number : number + 1], np.array([[60 + number]]), weights, config, cache)
        assert np.abs(logits[0, 0] - logits_then).max() < TOLERANCE, f"step {number}"


@pytest.mark.parametrize("name", ["qwen3.5", "qwen3.5-tied", "qwen3.5-yarn", "qwen3.5-moe", "qwen3-next"])
def test_greedy_tokens_of_prompts_of_unequal_length(make_hybrid: Callable, name: str):
    pair = make_hybrid(CONFIGS[name])
    prompts = [random_tokens(length, seed=length).tolist() for length in (3, 70, 128, 1)]
    outputs = generate(pair.model, prompts, SamplingParams(max_tokens=20, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == pair.reference_greedy(prompt, 20)


def test_greedy_tokens_of_a_batch_that_the_reference_fills_up_on_the_left(make_hybrid: Callable):
    pair = make_hybrid(CONFIGS["qwen3.5"])
    prompts = [random_tokens(length, seed=length).tolist() for length in (5, 70, 66)]
    padded = torch.tensor([[0] * (70 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (70 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        found = pair.reference.generate(
            padded, attention_mask=mask, do_sample=False, eos_token_id=-1, max_new_tokens=20, pad_token_id=0
        )
    outputs = generate(pair.model, prompts, SamplingParams(max_tokens=20, ignore_eos=True))
    assert [output.token_ids for output in outputs] == found[:, 70:].tolist()


def test_decays_of_16_bits(make_hybrid: Callable):
    """Qwen3.6 publishes them so; they are computed with in float32."""
    pair, tokens = make_hybrid(CONFIGS["qwen3.5"], decays=torch.bfloat16), random_tokens(2, 130)
    assert np.abs(np.asarray(pair.model.logits(tokens)) - pair.reference_logits(tokens)).max() < TOLERANCE


@pytest.mark.parametrize("name", ["qwen3.5", "qwen3-next"])
def test_16_bits_are_no_further_from_float32_than_twice_the_reference(make_hybrid: Callable, name: str):
    pair = make_hybrid(CONFIGS[name], dtype="bfloat16")
    tokens = random_tokens(4, 64)
    exact = pair.reference_logits(tokens)
    ours = np.abs(np.asarray(pair.model.logits(tokens)) - exact)
    theirs = np.abs(
        type(pair)(pair.reference.to(torch.bfloat16), pair.model, pair.folder).reference_logits(tokens) - exact
    )
    assert pair.model.weights.embedding.dtype == "bfloat16"
    assert ours.mean() <= 2 * theirs.mean()
    assert ours.max() <= 2 * theirs.max()
