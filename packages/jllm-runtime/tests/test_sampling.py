"""Sampling, held against a plain reference that sorts."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jllm_runtime import SamplingParams
from jllm_runtime.sampling import SamplingArrays, filtered_logits, sample

DRAWS = 20_000
# Twelve tokens: a clear best, a tie, a long tail.
LOGITS = np.array([2.0, 1.5, 1.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, -3.0, 0.25, -5.0], np.float32)

draw = jax.jit(sample)
keep = jax.jit(filtered_logits)


def reference(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The probability of each token, by sorting, in float64."""
    scaled = logits.astype(np.float64) / params.temperature
    if 0 < params.top_k < scaled.size:
        edge = np.sort(scaled)[::-1][params.top_k - 1]
        scaled = np.where(scaled >= edge, scaled, -np.inf)
    if params.top_p < 1:
        probabilities = softmax(scaled)
        falling = np.sort(probabilities)[::-1]
        edge = falling[np.flatnonzero(np.cumsum(falling) >= params.top_p)[0]]
        scaled = np.where(probabilities >= edge, scaled, -np.inf)
    probabilities = softmax(scaled)
    return softmax(np.where(probabilities >= params.min_p * probabilities.max(), scaled, -np.inf))


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max())
    return exponentials / exponentials.sum()


def rows(params: SamplingParams, seeds: np.ndarray) -> SamplingArrays:
    """These parameters in every row, with the row's own seed."""
    one = SamplingArrays.of([params])
    fields = {name: np.repeat(getattr(one, name), len(seeds)) for name in ("temperature", "top_k", "top_p", "min_p")}
    words = [divmod(int(seed), 2**32) for seed in seeds]
    return SamplingArrays(**fields, seed=np.array(words, np.uint32))


def draws(params: SamplingParams, seeds: np.ndarray | int = 0, positions: np.ndarray | int = 0) -> np.ndarray:
    """DRAWS tokens from LOGITS, and how often each came."""
    seeds, positions = (np.broadcast_to(np.asarray(x), (DRAWS,)) for x in (seeds, positions))
    tokens = draw(np.tile(LOGITS, (DRAWS, 1)), positions.astype(np.int32), rows(params, seeds))
    return np.bincount(np.asarray(tokens), minlength=LOGITS.size)


def p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """How often a fair draw is at least this far from its expectation."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0, "a token without probability was drawn"
    return float(scipy.stats.chisquare(counts[possible], probabilities[possible] * counts.sum()).pvalue)


KNOBS = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"temperature": 1.0, "top_k": 3},  # tokens 2 and 3 tie at the edge: both stay
    {"temperature": 1.0, "top_k": 6},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 0.4},
    {"temperature": 2.0, "top_k": 8, "top_p": 0.8},
    {"temperature": 0.8, "top_k": 5, "min_p": 0.3},
    {"temperature": 1.5, "top_p": 0.7, "min_p": 0.25},
    {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.15},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_draws_over_seeds_follow_the_distribution(knobs: dict[str, float]) -> None:
    params = SamplingParams(**knobs)
    assert p_value(draws(params, seeds=np.arange(DRAWS)), reference(LOGITS, params)) > 1e-3


@pytest.mark.parametrize("knobs", [KNOBS[0], KNOBS[-1]], ids=str)
def test_draws_over_positions_follow_the_distribution(knobs: dict[str, float]) -> None:
    params = SamplingParams(**knobs)
    assert p_value(draws(params, seeds=12, positions=np.arange(DRAWS)), reference(LOGITS, params)) > 1e-3


@pytest.mark.parametrize(
    ("drawn", "claimed"),
    [
        ({"temperature": 1.0}, {"temperature": 1.1}),
        ({"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.95}),
        ({"temperature": 1.0, "top_k": 9}, {"temperature": 1.0, "top_k": 10}),
        ({"temperature": 1.0, "min_p": 0.1}, {"temperature": 1.0, "min_p": 0.04}),
    ],
    ids=str,
)
def test_the_distribution_test_notices_a_small_difference(drawn: dict[str, float], claimed: dict[str, float]) -> None:
    counts = draws(SamplingParams(**drawn), seeds=np.arange(DRAWS))
    assert p_value(counts, reference(LOGITS, SamplingParams(**claimed))) < 1e-6


def test_neighbouring_positions_of_one_text_are_independent() -> None:
    """Pairs of tokens, drawn one after the other with the same seed, follow the product of the distributions."""
    params, seeds = SamplingParams(temperature=1.0), np.arange(DRAWS)
    logits = np.tile(LOGITS, (DRAWS, 1))
    pair = [np.asarray(draw(logits, np.full(DRAWS, at, np.int32), rows(params, seeds))) for at in (7, 8)]
    counts = np.bincount(pair[0] * LOGITS.size + pair[1], minlength=LOGITS.size**2)
    probabilities = np.outer(reference(LOGITS, params), reference(LOGITS, params)).ravel()
    common = probabilities * DRAWS >= 5  # the chi-square approximation needs a few of each
    counts = np.append(counts[common], counts[~common].sum())
    probabilities = np.append(probabilities[common], probabilities[~common].sum())
    assert p_value(counts, probabilities) > 1e-3


@given(data=st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_filters_keep_what_the_reference_keeps(data: st.DataObject) -> None:
    # Quarters, so that tokens tie and tie exactly; from nearly even to nearly certain.
    most = data.draw(st.sampled_from([2, 8, 40]))
    quarters = data.draw(arrays.arrays(np.int64, (2, 16), elements=st.integers(-most, most), fill=st.nothing()))
    logits = quarters.astype(np.float32) / 4
    params = [
        SamplingParams(
            temperature=data.draw(st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0])),
            top_k=data.draw(st.integers(0, 20)),
            top_p=data.draw(st.floats(0.01, 1)),
            min_p=data.draw(st.floats(0, 1)),
            seed=0,
        )
        for _ in logits
    ]
    for row, own in zip(logits, params, strict=True):
        assume(not on_an_edge(row, own))
    kept = np.asarray(keep(logits, SamplingArrays.of(params)))
    for row, own, got in zip(logits, params, kept, strict=True):
        np.testing.assert_allclose(softmax(got.astype(np.float64)), reference(row, own), atol=1e-6)
        np.testing.assert_array_equal(np.isfinite(got), reference(row, own) > 0)


def on_an_edge(logits: np.ndarray, params: SamplingParams) -> bool:
    """Whether rounding to float32 may decide what top-p or min-p keeps."""
    before = reference(logits, SamplingParams(temperature=params.temperature, top_k=params.top_k))
    sums = np.cumsum(np.sort(before)[::-1])
    after = reference(logits, SamplingParams(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p))
    shares = after / after.max()
    near_sum = params.top_p < 1 and np.abs(sums - params.top_p).min() < 1e-5
    return bool(near_sum or np.abs(shares[shares < 1] - params.min_p).min(initial=1) < 1e-5)


def test_the_filters_keep_what_the_reference_keeps_of_a_large_vocabulary() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (2, 151_936)).astype(np.float32)
    params = [
        SamplingParams(temperature=0.7, top_k=50, top_p=0.9, min_p=0.02, seed=0),
        SamplingParams(temperature=1.2, top_p=0.5, seed=0),
    ]
    kept = np.isfinite(np.asarray(keep(logits, SamplingArrays.of(params))))
    for row, own, got in zip(logits, params, kept, strict=True):
        expected = reference(row, own) > 0
        assert 0 < got.sum() < row.size
        # The sum of that many float32 may pass p one token earlier or later.
        assert abs(int(got.sum()) - int(expected.sum())) <= (0 if own.top_k else 5)
        assert (got <= expected).all() or (expected <= got).all()


def test_what_is_kept_keeps_its_logit() -> None:
    params = SamplingArrays.of([SamplingParams(temperature=0.5, top_k=4, seed=0)])
    kept = np.asarray(keep(LOGITS[None], params))[0]
    np.testing.assert_array_equal(kept[np.isfinite(kept)], (LOGITS / 0.5)[[0, 1, 2, 3]])


def test_tokens_that_tie_at_the_edge_all_stay() -> None:
    logits = np.array([[3.0, 1.0, 1.0, 1.0, 0.0]], np.float32)
    for knobs in ({"top_k": 2}, {"top_p": 0.8}, {"min_p": 0.1}):
        kept = np.asarray(keep(logits, SamplingArrays.of([SamplingParams(temperature=1.0, seed=0, **knobs)])))
        assert np.isfinite(kept)[0].tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("knobs", [{"top_p": 1e-6}, {"top_p": 1e-30}, {"top_p": 0}, {"top_k": 1}, {"min_p": 1.0}])
def test_the_narrowest_filter_keeps_the_best_token(knobs: dict[str, float]) -> None:
    params = SamplingParams(temperature=1.0, **knobs)
    logits = np.roll(LOGITS, 5)
    tokens = draw(np.tile(logits, (50, 1)), np.arange(50, dtype=np.int32), rows(params, np.arange(50)))
    assert set(tokens.tolist()) == {5}


def test_a_low_temperature_draws_the_best_token() -> None:
    for temperature in (1e-3, 1e-6, 1e-30, 1e-300):
        tokens = draws(SamplingParams(temperature=temperature), seeds=np.arange(DRAWS))
        assert tokens[0] == DRAWS


@given(
    logits=arrays.arrays(np.float32, (3, 16), elements=st.floats(-100, 100, width=32)), seed=st.integers(0, 2**64 - 1)
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_greedy_takes_the_first_of_the_largest(logits: np.ndarray, seed: int) -> None:
    params = SamplingArrays.of([SamplingParams(seed=seed, top_k=2, top_p=0.5, min_p=0.5)] * 3)
    assert draw(logits, np.arange(3, dtype=np.int32), params).tolist() == np.argmax(logits, axis=-1).tolist()


def test_greedy_and_sampled_rows_mix() -> None:
    count = 200
    logits = np.random.default_rng(0).standard_normal((count, LOGITS.size)).astype(np.float32)
    params = [SamplingParams(temperature=(row % 2) * 1.5, seed=row) for row in range(count)]
    tokens = np.asarray(draw(logits, np.zeros(count, np.int32), SamplingArrays.of(params)))
    best = np.argmax(logits, axis=-1)
    np.testing.assert_array_equal(tokens[0::2], best[0::2])
    assert (tokens[1::2] != best[1::2]).any()


def test_a_greedy_row_beside_a_sampled_one_takes_the_first_of_the_largest() -> None:
    params = [SamplingParams(temperature=(row % 2) * 1.5, seed=row) for row in range(200)]
    tokens = draw(np.zeros((200, LOGITS.size), np.float32), np.zeros(200, np.int32), SamplingArrays.of(params))
    assert set(tokens[0::2].tolist()) == {0}
    assert len(set(tokens[1::2].tolist())) > 6


def test_a_token_depends_on_its_own_row_alone() -> None:
    """Wherever the row stands, and whatever the others ask for."""
    rng = np.random.default_rng(1)
    own = SamplingParams(temperature=1.2, top_k=9, top_p=0.95, seed=2**64 - 1)
    others = [
        SamplingParams(seed=1),
        SamplingParams(temperature=2.0, seed=2),
        SamplingParams(temperature=0.3, min_p=0.3, seed=3),
    ]
    alone = draw(LOGITS[None], np.array([77], np.int32), SamplingArrays.of([own])).tolist()
    for place in range(4):
        logits = rng.standard_normal((4, LOGITS.size)).astype(np.float32)
        logits[place] = LOGITS
        positions = rng.integers(0, 1000, 4).astype(np.int32)
        positions[place] = 77
        params = SamplingArrays.of([*others[:place], own, *others[place:]])
        assert draw(logits, positions, params)[place].tolist() == alone[0]


@pytest.mark.parametrize("varied", ["seeds", "positions"])
def test_other_seeds_and_other_positions_give_other_draws(varied: str) -> None:
    params = SamplingParams(temperature=5.0)
    count = 64
    numbers = np.concatenate([np.arange(32), 2**31 - np.arange(1, 33)])
    chosen = partial(draw, np.zeros((count, 5000), np.float32))
    if varied == "seeds":
        # Up to the largest: seeds past 2**31 must not fold onto smaller ones, nor those past 2**32.
        numbers = [*range(16), *(2**32 + n for n in range(-16, 16)), *(2**64 - n for n in range(1, 17))]
        tokens = chosen(np.zeros(count, np.int32), rows(params, np.array(numbers, object)))
    else:
        tokens = chosen(numbers.astype(np.int32), rows(params, np.zeros(count)))
    # 64 of 5000 at random: two or three coincidences would be no wonder, more would be one.
    assert len(set(tokens.tolist())) > 59


def test_draws_do_not_depend_on_who_draws(tiny) -> None:
    """XLA or, where they are installed, the CPU kernels."""
    logits = np.random.default_rng(0).normal(0, 2, (64, 5000)).astype(np.float32)
    params = [
        SamplingParams(
            temperature=1.0, top_k=row % 3 * 20, top_p=1 - row % 2 * 0.2, min_p=row % 5 * 0.01, seed=row * 12345**4
        )
        for row in range(64)
    ]
    arrays_, positions = SamplingArrays.of(params), np.arange(64, dtype=np.int32)
    backend = tiny.plain.backend  # made here: a model that is made while JAX traces would consist of tracers
    by_kernel = jax.jit(lambda *given: sample(*given, backend))(logits, positions, arrays_)
    np.testing.assert_array_equal(by_kernel, draw(logits, positions, arrays_))


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1, 2**32, 2**64 - 1])
def test_a_seed_is_the_key_of_jax(seed: int) -> None:
    """One of 32 bits as always; the upper bits of a larger one are the key's other word, as in JAX's 64-bit mode."""
    [ours] = SamplingArrays.of([SamplingParams(seed=seed)]).seed.tolist()
    assert ours == [seed >> 32, seed % 2**32]
    if seed < 2**32:
        assert ours == jax.random.key_data(jax.random.key(np.uint32(seed), impl="threefry2x32")).tolist()


def test_a_seed_means_the_same_under_another_default_generator() -> None:
    ours = draw(
        np.zeros((1, 5000), np.float32), np.array([3], np.int32), rows(SamplingParams(temperature=1.0), np.ones(1))
    )
    with jax.default_prng_impl("rbg"):
        theirs = jax.jit(lambda *inputs: sample(*inputs))(
            jnp.zeros((1, 5000)), np.array([3], np.int32), rows(SamplingParams(temperature=1.0), np.ones(1))
        )
    assert ours.tolist() == theirs.tolist()


def _published(**settings: object) -> Any:
    return SimpleNamespace(generation_config=settings)


def test_publishers_parameters() -> None:
    # Qwen3's, as published.
    qwen3 = _published(bos_token_id=1, do_sample=True, temperature=0.6, top_k=20, top_p=0.95)
    assert SamplingParams.of(qwen3) == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    assert SamplingParams.of(qwen3, temperature=0, top_k=None).temperature == 0
    assert SamplingParams.of(qwen3, top_p=0.5) == SamplingParams(temperature=0.6, top_k=20, top_p=0.5)
    assert SamplingParams.of(_published(repetition_penalty=1.05)).repetition_penalty == 1.05


@pytest.mark.parametrize("settings", [{}, {"eos_token_id": 2}, {"do_sample": False, "temperature": 0.6, "top_p": 0.9}])
def test_greedy_where_the_publisher_says_nothing(settings: dict[str, object]) -> None:
    assert SamplingParams.of(_published(**settings)) == SamplingParams()


def test_sampling_without_a_temperature_divides_by_one() -> None:
    assert SamplingParams.of(_published(do_sample=True)).temperature == 1
    assert SamplingParams.of(_published(do_sample=True, top_p=0.9)) == SamplingParams(temperature=1, top_p=0.9)
