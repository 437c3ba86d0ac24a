"""Requests through the attention of GPUs: the kernel by Pallas' interpreter, and blocks, on the CPU."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest
from jllm_core.backends.base import XLA
from jllm_core.backends.gpu.backend import GPU
from jllm_runtime import Engine, EngineConfig, Model, SamplingParams, generate

GREEDY = SamplingParams(max_tokens=6)
SIZES = EngineConfig(pages=48, page_size=16, max_batch=4)


def models(tiny: Any, dtype: Any, **changes: Any) -> tuple[Model, Model]:
    """The same model with XLA's attention, and with that of GPUs."""
    config = dataclasses.replace(tiny.config, num_layers=1, head_dim=16, **changes)
    plain, ours = (tiny.random(config, dtype) for _ in range(2))
    # In place of the choice by the devices that are here.
    vars(plain)["backend"] = XLA(plain.placement)
    vars(ours)["backend"] = GPU(ours.placement, triton=False, interpret=dtype != jnp.float32)
    return plain, ours


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (jnp.float32, {}),
        (jnp.float16, {"windows": (20,)}),
    ],
    ids=["blocks", "kernel"],
)
def test_the_engine_and_generate_give_the_tokens_of_the_plain_attention(
    dtype: Any, changes: dict[str, Any], tiny: Any, prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pieces of prompts as a CPU can take them.
    monkeypatch.setattr(GPU, "prefill_tokens", 32)
    plain, ours = models(tiny, dtype, **changes)
    prompts = [prompt(length) for length in (5, 40, 33)]
    expected = [tiny.naive_greedy(plain, each, GREEDY.max_tokens) for each in prompts]
    assert [output.token_ids for output in generate(ours, prompts, GREEDY)] == expected
    with Engine(ours, SIZES) as engine:
        assert [output.token_ids for output in engine.generate(prompts, GREEDY)] == expected
        # Alone, and over pages that others have left: the same, to the bit.
        [alone] = engine.generate([prompts[1]], dataclasses.replace(GREEDY, logprobs=1))
        [again] = engine.generate([prompts[1]], dataclasses.replace(GREEDY, logprobs=1))
        assert alone.token_ids == expected[1]
        assert again.reused_tokens > 0
        assert [each.logprob for each in alone.logprobs] == [each.logprob for each in again.logprobs]
