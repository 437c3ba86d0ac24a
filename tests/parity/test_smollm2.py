"""Real weights: SmolLM2-135M-Instruct from its GGUF file, beside transformers, which reads the same file by itself."""

import copy
import json
import logging
import re
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from jllm_convert import convert
from jllm_runtime import SamplingParams, generate, load_model
from jllm_runtime.programs import contiguous_batch

GREEDY = SamplingParams(max_tokens=64, ignore_eos=True)
ESSAY = (
    "The history of the lighthouse begins with fires that were lit on hilltops, so that sailors could find the mouth "
    "of a harbour at night. Later the fires were put on platforms, and the platforms became towers of stone. "
)
CHATS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List three prime numbers greater than 100 and say how you know.",
]
RAW = [
    "Once upon a time",
    "def fibonacci(n):\n",
    "1 + 1 = 2\n2 + 2 = 4\n3 + 3 =",
    ESSAY * 12 + "In short,",
]


@pytest.fixture(scope="module")
def prompts(smollm2) -> list[list[int]]:
    """Chat and raw, from a few tokens to over 512."""
    tokenizer = smollm2.model.tokenizer
    chats = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in CHATS]
    ids = chats + [tokenizer.encode(text) for text in RAW]
    assert min(map(len, ids)) < 8
    assert max(map(len, ids)) > 512
    return ids


@pytest.fixture(scope="module")
def expected(smollm2, prompts) -> list[list[int]]:
    """What the reference goes on with, 64 tokens each."""
    return [smollm2.reference_greedy(prompt, 64) for prompt in prompts]


def test_the_weights_are_the_reference_s_own(smollm2):
    """The two dequantise and reorder the file independently."""
    state = smollm2.reference.state_dict()
    layer = smollm2.model.weights.layers[17]
    q = state["model.layers.17.self_attn.q_proj.weight"].numpy()
    np.testing.assert_array_equal(np.asarray(layer.attn.q).reshape(576, 576), q.T)
    k = state["model.layers.17.self_attn.k_proj.weight"].numpy()
    np.testing.assert_array_equal(np.asarray(layer.attn.k).reshape(576, 192), k.T)
    down = state["model.layers.17.mlp.down_proj.weight"].numpy()
    np.testing.assert_array_equal(np.asarray(layer.ffw.w_down), down.T)


def test_logits_to_one_part_in_a_hundred_thousand(smollm2, prompts):
    """Of the largest logit, which is near 40 here. Float32 says no more after 30 layers: measured against the same
    weights in float64, the reference is off by up to 9e-5 and JLLM by up to 1.8e-4.
    """
    for prompt in prompts:
        tokens = np.array([prompt])
        ours, theirs = np.asarray(smollm2.model.logits(tokens)), smollm2.reference_logits(tokens)
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
        assert np.abs(ours - theirs).mean() < 5e-5


def test_each_prompt_alone_gives_the_reference_s_tokens(smollm2, prompts, expected):
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert generate(smollm2.model, prompt, GREEDY)[0].token_ids == tokens


def test_a_batch_of_four_different_lengths_gives_the_same_tokens(smollm2, prompts, expected):
    which = (0, 4, 7, 2)
    outputs = generate(smollm2.model, [prompts[number] for number in which], GREEDY)
    assert [output.token_ids for output in outputs] == [expected[number] for number in which]


def test_the_capital_of_france(smollm2, prompts):
    output = generate(smollm2.model, prompts[0])[0]
    assert output.text == "The capital of France is Paris."
    assert output.finish_reason == "stop"


def test_repetition_penalty(smollm2, prompts):
    params = replace(GREEDY, repetition_penalty=1.3)
    expected = smollm2.reference_greedy(prompts[2], params.max_tokens, repetition_penalty=1.3)
    assert expected != smollm2.reference_greedy(prompts[2], params.max_tokens)
    for lookup in (0, 7):
        assert generate(smollm2.model, prompts[2], params, lookup=lookup)[0].token_ids == expected


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(smollm2, prompts):
    seeded = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=24, ignore_eos=True)
    alone = generate(smollm2.model, prompts[2], seeded)[0].token_ids
    others = [SamplingParams(temperature=1.5, seed=number, max_tokens=24, ignore_eos=True) for number in range(3)]
    beside = generate(smollm2.model, [prompts[7], prompts[4], prompts[2], prompts[0]], [*others[:2], seeded, others[2]])
    assert beside[2].token_ids == alone
    assert beside[0].token_ids != alone


def test_prefill_and_decode_are_a_handful_of_programs(smollm2, prompts, caplog):
    """One of each for a batch size and a capacity: what was compiled by other tests of the process does not count."""
    contiguous_batch.decode.clear_cache()
    contiguous_batch.prefill.clear_cache()
    short = SamplingParams(max_tokens=4, ignore_eos=True)
    with caplog.at_level(logging.DEBUG, logger="jax"), jax.log_compiles():
        for prompt in prompts:  # seven of at most 252 tokens, one of more than 512
            generate(smollm2.model, prompt, short)
        generate(smollm2.model, [prompts[number] for number in (0, 4, 5, 2)], short)
    compiled = [re.match(r"Finished XLA compilation of jit\((\w+)\)", record.message) for record in caplog.records]
    programs = Counter(match[1] for match in compiled if match)
    assert programs["decode"] == 3  # (1, 256), (1, 1024), (4, 256)
    assert programs["prefill"] == 4  # of the long prompt one for 256 tokens at a time, and one for the rest


def test_the_folder_of_transformers_converts_to_the_same_model(smollm2, prompts, tmp_path):
    """From safetensors shards and a transformers 5 config.json, as from the GGUF: the same hashes."""
    smollm2.reference.save_pretrained(tmp_path / "hf", max_shard_size="200MB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    conversion = convert(tmp_path / "hf", tmp_path / "jllm")
    assert "the model will take token ids only" in conversion.warnings[0]
    hashes = json.loads((smollm2.folder / "jllm" / "manifest.json").read_text())["arrays"]
    assert conversion.manifest.arrays == hashes
    model = load_model(tmp_path / "jllm")
    assert model.tokenizer is None
    short = SamplingParams(max_tokens=4)
    assert generate(model, prompts[0], short)[0].token_ids == generate(smollm2.model, prompts[0], short)[0].token_ids


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_no_further_off_than_the_reference_s(smollm2, prompts, dtype):
    tokens = np.array([prompts[0]])
    exact = smollm2.reference_logits(tokens)
    ours = np.abs(np.asarray(load_model(smollm2.folder / "jllm", dtype=dtype).logits(tokens)) - exact)
    rounded = replace(smollm2, reference=copy.deepcopy(smollm2.reference).to(getattr(torch, dtype)))
    theirs = np.abs(rounded.reference_logits(tokens) - exact)
    assert ours.mean() <= 2 * theirs.mean()
    assert ours.max() <= 2 * theirs.max()


def test_float16_goes_on_as_float32_does(smollm2, prompts, expected, tmp_path):
    """Converted to float16, with a receipt that its activations fit, and generated by the kernels through a cache."""
    conversion = convert(smollm2.folder / "jllm", tmp_path / "half", dtype="float16")
    assert conversion.receipt is not None
    assert not conversion.receipt.overflows
    assert conversion.receipt.kl_nats < 1e-4
    model = load_model(tmp_path / "half")
    assert model.weights.dtype == "float16"
    outputs = generate(model, prompts[:4], replace(GREEDY, max_tokens=16))
    same = [output.token_ids == tokens[:16] for output, tokens in zip(outputs, expected, strict=False)]
    assert sum(same) >= 3  # a near tie may go the other way
