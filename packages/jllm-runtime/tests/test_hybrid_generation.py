"""Models with delta nets through the contiguous cache: each token of a text moves its states once, and no other."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core import ModelConfig
from jllm_core.array_info import named_leaves, path_name
from jllm_core.kv_cache import NoCache
from jllm_core.model import hidden_states
from jllm_runtime import Model, RequestError, SamplingParams, embed, generate, load_model, stream_generate
from jllm_runtime.cache.contiguous import ContiguousCache, cache_info
from jllm_runtime.chat.local import ChatSession
from jllm_runtime.programs import contiguous_batch

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module", params=["XLA", "kernels"])
def config(tiny, request) -> ModelConfig:
    """On a CPU with kernels they compute the layers whose heads are whole vectors."""
    return tiny.hybrid if request.param == "XLA" else tiny.hybrid_of_vectors


@pytest.fixture(scope="module")
def model(tiny, config: ModelConfig) -> Model:
    return tiny.random(config, tokenizer=tiny.tokenizer)


def cache_of(model: Model, rows: int, capacity: int = 256) -> ContiguousCache:
    info = cache_info(model.config, rows, capacity, model.weights.dtype)
    return contiguous_batch.empty_cache(info.shape, info.dtype, model.config, model.backend)


def prefilled(model: Model, prompts: list[list[int]], chunks: list[tuple[int, int, int]], fill: int = 0) -> Any:
    """The cache, and the last hidden states, after chunks ``(size, first, end)`` of these prompts."""
    cache = cache_of(model, len(prompts))
    tokens = np.full((len(prompts), cache.capacity), fill, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    hidden = np.zeros((len(prompts), model.config.hidden_size), np.float32)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    for size, first, end in chunks:
        piece = np.int32(first), np.int32(end)
        cache, hidden = contiguous_batch.prefill(
            model.weights, cache, tokens, lengths, hidden, piece, model.config, size
        )
    return cache, np.asarray(hidden)


def states(cache: ContiguousCache) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in named_leaves(cache.states).items()}


def assert_same_states(a: dict[str, np.ndarray], b: dict[str, np.ndarray], rows: Any = slice(None)) -> None:
    assert a.keys() == b.keys()
    for name, array in a.items():
        np.testing.assert_array_equal(array[rows], b[name][rows], err_msg=name)


def test_the_tokens_are_those_of_the_model_without_a_cache(model: Model, tiny, prompt) -> None:
    prompts = [prompt(length) for length in (3, 70, 128, 1)]
    outputs = generate(model, prompts, GREEDY)
    for ids, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == tiny.naive_greedy(model, ids, 24)


def test_an_answer_is_the_same_alone_beside_others_and_piece_by_piece(model: Model, prompt) -> None:
    # Rows end at different tokens; those that have ended are fed on.
    prompts, limits = [prompt(length) for length in (66, 5, 64, 130, 9)], (20, 2, 33, 7, 1)
    params = [SamplingParams(max_tokens=limit, ignore_eos=True) for limit in limits]
    together = generate(model, prompts, params)
    for ids, own, output in zip(prompts, params, together, strict=True):
        assert generate(model, [ids], own)[0].token_ids == output.token_ids
        pieces = [token for piece in stream_generate(model, ids, own) for token in piece.token_ids]
        assert pieces == output.token_ids


def test_a_cache_that_grows_keeps_its_states(model: Model, tiny, prompt) -> None:
    ids = prompt(250)
    assert generate(model, [ids], GREEDY)[0].token_ids == tiny.naive_greedy(model, ids, 24)


def test_what_fills_up_a_prompt_does_not_move_a_state(model: Model, prompt) -> None:
    prompts = [prompt(70), prompt(5), prompt(64), []]
    cache, hidden = prefilled(model, prompts, [(64, 0, 2)])
    other, other_hidden = prefilled(model, prompts, [(64, 0, 2)], fill=7)
    assert_same_states(states(cache), states(other))
    np.testing.assert_array_equal(hidden, other_hidden)
    for name, array in states(cache).items():
        assert not array[3].any(), name
        assert array[:3].reshape(3, -1).any(axis=1).all(), name


def test_a_prompt_in_pieces_leaves_the_state_of_a_whole_one(model: Model, prompt) -> None:
    prompts = [prompt(150), prompt(70)]
    whole, hidden = prefilled(model, prompts, [(64, 0, 3)])
    pieces, same = prefilled(model, prompts, [(64, 0, 1), (64, 1, 1), (64, 1, 2), (64, 2, 3)])
    assert_same_states(states(whole), states(pieces))
    np.testing.assert_array_equal(hidden, same)
    # In chunks of another size, up to rounding.
    large, near = prefilled(model, prompts, [(128, 0, 1), (64, 2, 3)])
    np.testing.assert_allclose(near, hidden, atol=1e-4)
    for name, array in states(whole).items():
        np.testing.assert_allclose(states(large)[name], array, atol=1e-4, err_msg=name)


def test_rows_that_have_ended_keep_their_state_to_the_bit(model: Model, prompt) -> None:
    prompts = [prompt(10), prompt(20)]
    cache, _ = prefilled(model, prompts, [(64, 0, 1)])
    before = states(cache)
    sampling = contiguous_batch.SamplingArrays.of([SamplingParams(seed=0)] * 2)
    after, made = contiguous_batch.decode(
        *(model.weights, cache, np.array([3, 4], np.int32), np.array([10, 20], np.int32), np.array([False, True])),
        *(np.array([200, 200], np.int32), np.full((2, 4), -1, np.int32), sampling, np.int32(5), model.config),
    )
    assert (np.asarray(made)[0, :5] >= 0).all()
    assert_same_states(before, states(after), rows=1)
    assert not np.array_equal(before["0.memory"][0], states(after)["0.memory"][0])


def test_only_attention_layers_take_memory_for_keys_and_values(model: Model) -> None:
    cache = cache_of(model, 2)
    assert [keys.nbytes for keys in cache.keys] == [0, 2 * 2 * 256 * model.config.head_dim * 4]
    assert cache.capacity == 256
    assert cache.states.keys() == {0}
    assert {array.dtype.name for array in jax.tree.leaves(cache.states)} == {"float32"}
    assert not any(array.any() for array in states(cache).values())


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_states_are_kept_in_float32_whatever_the_keys_are(model: Model, prompt, kv_dtype: Any) -> None:
    ids = prompt(40)
    exact, rounded = (generate(model, [ids], GREEDY, kv_dtype=kind)[0].token_ids for kind in (None, kv_dtype))
    assert exact[:3] == rounded[:3]


def test_a_model_of_delta_nets_alone_has_a_cache(tiny, config: ModelConfig, prompt) -> None:
    alone = tiny.random(dataclasses.replace(config, mixers=("delta_net",) * 2))
    ids = prompt(250)
    assert generate(alone, [ids], GREEDY)[0].token_ids == tiny.naive_greedy(alone, ids, 24)


def test_embeddings_are_the_states_of_the_plain_model(model: Model, prompt) -> None:
    lengths = [16, 65]
    found = embed(model, [prompt(length) for length in lengths], "last", normalize=False)
    run = jax.jit(hidden_states, static_argnames="config")
    for vector, length in zip(found, lengths, strict=True):
        ids = np.array([prompt(length)])
        hidden, _ = run(ids, np.arange(length)[None], model.weights, config=model.config, cache=NoCache())
        np.testing.assert_allclose(vector, hidden[0, -1], atol=1e-4)


def test_lookup_is_refused_by_name(model: Model, prompt) -> None:
    with pytest.raises(RequestError, match="lookup is 7, but qwen3 has delta nets, whose states do not go back"):
        generate(model, [prompt(5)], GREEDY, lookup=7)
    with pytest.raises(RequestError, match="delta nets"):
        stream_generate(model, prompt(5), GREEDY, lookup=1)


def test_a_chat_refuses_lookup_by_name(model: Model) -> None:
    with pytest.raises(RequestError, match="delta nets"):
        list(ChatSession(model, SamplingParams(), lookup=7).send("hello"))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_hybrid_is_saved_and_loaded_with_its_decays_in_float32(
    model: Model, tiny, tmp_path: Path, prompt, dtype: Any
) -> None:
    def kept(name: str) -> bool:
        return name.endswith(("a_log", "dt_bias", "attn.gamma"))

    def cast(path: Any, array: Any) -> Any:
        return array if kept(path_name(path)) else array.astype(dtype)

    saved = jax.tree_util.tree_map_with_path(cast, model.weights)
    given = dataclasses.replace(model, weights=saved)
    given.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    arrays = named_leaves(again.weights)
    assert {array.dtype.name for name, array in arrays.items() if kept(name)} == {"float32"}
    assert again.config == model.config
    for name, array in named_leaves(saved).items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    assert generate(again, [prompt(20)], GREEDY)[0].token_ids == generate(given, [prompt(20)], GREEDY)[0].token_ids
    # In another type than it is saved in.
    other = named_leaves(load_model(tmp_path / "saved", dtype="float16").weights)
    assert {array.dtype.name for name, array in other.items() if kept(name)} == {"float32"}
    assert other["embedding"].dtype == jnp.float16
