"""Embeddings: the hidden states of the plain model, pooled; the same bits whoever else is embedded."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core import ModelConfig
from jllm_core.config import MoEConfig, RopeScaling
from jllm_core.kv_cache import NoCache
from jllm_core.model import hidden_states
from jllm_runtime import Model, RequestError, embed, embedding
from jllm_runtime.programs import scoring

LENGTHS = [1, 16, 40, 64, 65, 200]


states = jax.jit(hidden_states, static_argnames="config")


def plain(model: Model, ids: list[int]) -> np.ndarray:
    """The hidden states ``[T, D]`` of the model without a cache."""
    # Filled up to one length: no token sees what comes after it, and one program serves every length.
    filled = np.array([ids + [0] * (model.config.context_length - len(ids))])
    positions, lengths = np.arange(filled.shape[1])[None], np.array([len(ids)])
    hidden, _ = states(filled, positions, model.weights, config=model.config, cache=NoCache(), lengths=lengths)
    return np.asarray(hidden[0, : len(ids)], np.float32)


def families(config: ModelConfig) -> dict[str, ModelConfig]:
    one = dataclasses.replace(config, num_layers=1)
    return {
        "qwen3": config,
        "llama": dataclasses.replace(one, model_type="llama", num_heads=9, num_kv_heads=3, qk_norm=False),
        "qwen3_moe": dataclasses.replace(
            one, model_type="qwen3_moe", moe=MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=16)
        ),
        "dynamic": dataclasses.replace(
            one, rope_scaling=RopeScaling(kind="dynamic", factor=2.0, original_context_length=64)
        ),
    }


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe", "dynamic"])
def test_the_pooled_states_of_the_plain_model(family: str, tiny, prompt) -> None:
    model = tiny.random(families(tiny.config)[family])
    prompts = [prompt(length) for length in LENGTHS]
    for pooling, pooled in (("mean", lambda x: x.mean(0)), ("last", lambda x: x[-1])):
        expected = np.stack([pooled(plain(model, ids)) for ids in prompts])
        found = embed(model, prompts, pooling, normalize=False)
        assert (found.dtype, found.shape) == (np.float32, (len(LENGTHS), model.config.hidden_size))
        np.testing.assert_allclose(found, expected, atol=2e-5)
        units = embed(model, prompts, pooling)
        np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(units, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=2e-5)


@pytest.mark.parametrize(
    ("family", "rows"), [("qwen3", 1), ("qwen3_moe", 1), ("llama", 4), ("qwen3_moe", 4)]
)  # one row, and always the same number, as on accelerators
def test_the_same_bits_alone_and_beside_others(
    family: str, rows: int, tiny, prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_shapes", lambda *_: ((rows, 64),))
    model = tiny.random(families(tiny.config)[family])
    prompts = [prompt(length, seed) for length in LENGTHS for seed in range(3)]
    together = embed(model, prompts)
    shuffled = np.random.default_rng(0).permutation(len(prompts))
    np.testing.assert_array_equal(embed(model, [prompts[number] for number in shuffled]), together[shuffled])
    for number in range(0, 18, 4):
        np.testing.assert_array_equal(embed(model, [prompts[number]]), together[number : number + 1])


def sixty_four(seed: int, longest: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 272, length).tolist() for length in rng.integers(1, longest + 1, 64)]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_many_short_texts_have_the_bits_of_each_alone_with_cpu_kernels(pooling: Any, tiny) -> None:
    config = dataclasses.replace(tiny.config, head_dim=64, num_layers=1, context_length=256)
    model = tiny.random(config)
    if not model.backend.name.startswith("CPU kernels"):
        pytest.skip(model.backend.name)
    prompts = sixty_four(0, 16) + sixty_four(1, 64)[:11]
    together = embed(model, prompts, pooling)
    for number in [*range(0, 64, 9), 64, 70, 74]:
        np.testing.assert_array_equal(embed(model, [prompts[number]], pooling)[0], together[number])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_many_short_texts_differ_by_rounding_at_most(family: str, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JLLM_KERNELS", "xla")
    model = tiny.random(families(tiny.config)[family])
    prompts = sixty_four(0, 16) + sixty_four(1, 64)[:11]
    for pooling in ("mean", "last"):
        together, alone = embed(model, prompts, pooling), [embed(model, [ids], pooling)[0] for ids in prompts[:70:6]]
        np.testing.assert_allclose(together[:70:6], alone, atol=2e-6)


def test_the_batches_of_many_texts(tiny) -> None:
    """Each text is in one; none computes more tokens than its texts filled up one by one; and there are few shapes."""
    rng = np.random.default_rng(0)
    for count in (1, 7, 64, 300, 2048):
        lengths = np.minimum(rng.geometric(0.08, count), 300).tolist()
        found = list(embedding.batches(tiny.plain, lengths))
        assert sorted(number for batch in found for number in batch.numbers) == list(range(count))
        for batch in found:
            own = [lengths[number] for number in batch.numbers]
            steps = -(-max(own) // batch.chunk)
            alone = [
                max(16, 1 << (length - 1).bit_length()) if length <= 64 else -(-length // 64) * 64 for length in own
            ]
            assert batch.rows * steps * batch.chunk <= sum(alone)
            assert batch.capacity % batch.chunk == 0
            assert len(own) == batch.rows
        assert len({(batch.rows, batch.chunk, batch.capacity) for batch in found}) <= 11
    # Of thousands, next to nothing is computed in vain.
    lengths = rng.integers(1, 17, 2048).tolist()
    steps = sum(
        64 * max(lengths[number] for number in batch.numbers) for batch in embedding.batches(tiny.plain, lengths)
    )
    assert steps < 1.05 * sum(lengths)


def test_what_the_rows_are_filled_up_with_does_not_matter(tiny, prompt) -> None:
    model, ids = tiny.plain, prompt(70)
    lengths, found = np.array([70], np.int32), []
    for filler in (0, 5):
        tokens = np.array([ids + [filler] * (256 - 70)], np.int32)
        found += [scoring.pooled_states(model.weights, tokens, lengths, 64, model.config, model.backend)]
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_few_programs_serve_all_lengths(tiny, prompt) -> None:
    embed(tiny.plain, [prompt(10), prompt(64), prompt(65)])
    before = scoring.pooled_states._cache_size()
    embed(tiny.plain, [prompt(length) for length in (1, 9, 16, 33, 60, 66, 130, 256)], "last")
    assert scoring.pooled_states._cache_size() == before


def test_texts_and_single_prompts(tiny) -> None:
    model = dataclasses.replace(tiny.plain, tokenizer=tiny.tokenizer)
    both = embed(model, ["the cat", list(b"dog")])
    np.testing.assert_array_equal(embed(model, "the cat"), both[:1])
    np.testing.assert_array_equal(embed(model, list(b"dog")), both[1:])
    assert embed(model, []).shape == (0, 64)


def test_bfloat16(tiny, prompt) -> None:
    config = dataclasses.replace(tiny.config, num_layers=1)
    exact, rounded = (embed(tiny.random(config, dtype), [prompt(70)]) for dtype in (jnp.float32, jnp.bfloat16))
    assert rounded.dtype == np.float32
    np.testing.assert_allclose(rounded, exact, atol=0.02)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1: the prompt is empty: it has no tokens"),
        ([[1] * 301], {}, "prompt 0: the prompt has 301 tokens, the context of the model is 300"),
        ([[1], [272]], {}, "prompt 1: token id 272 is outside the vocabulary of 272"),
        (["text"], {}, "prompt 0: the model has no tokenizer"),
        ([[1]], {"pooling": "cls"}, "pooling must be one of mean, last, got 'cls'"),
    ],
)
def test_what_cannot_be_embedded_is_refused(prompts: Any, options: dict[str, Any], message: str, tiny) -> None:
    with pytest.raises(RequestError, match=message):
        embed(tiny.plain, prompts, **options)
