"""The compiled programs themselves: what they leave out, which ``generate`` would not take either."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jllm_core.backends.select import select_backend
from jllm_core.weight_specs import abstract_weights
from jllm_runtime import SamplingParams
from jllm_runtime.cache.contiguous import PREFILL_CHUNK, ContiguousCache, cache_info
from jllm_runtime.programs import contiguous_batch
from jllm_runtime.sampling import SamplingArrays

CAPACITY = 256
NEVER = 10_000


def prefilled(model: Any, prompts: list[list[int]], calls: list[tuple[int, int]]) -> tuple[ContiguousCache, jax.Array]:
    """The cache and the last hidden states after these calls of ``prefill``, each some chunks of the prompts."""
    config, rows = model.config, len(prompts)
    info = cache_info(config, rows, CAPACITY, model.weights.embedding.dtype)
    cache = contiguous_batch.empty_cache(info.shape, info.dtype, config, model.backend)
    hidden = jax.device_put(np.zeros((rows, config.hidden_size), np.float32), model.replicated)
    tokens = np.zeros((rows, CAPACITY), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    for first, end in calls:
        chunks = (np.int32(first), np.int32(end))
        cache, hidden = contiguous_batch.prefill(model.weights, cache, tokens, lengths, hidden, chunks, config)
    return cache, hidden


def test_a_prompt_may_be_taken_in_pieces(tiny, prompt) -> None:
    prompts = [prompt(150), prompt(10)]
    whole, last = prefilled(tiny.plain, prompts, [(0, 3)])
    pieces, last_of_pieces = prefilled(tiny.plain, prompts, [(0, 1), (1, 1), (1, 3)])
    np.testing.assert_array_equal(last, last_of_pieces)
    for at_once, bit_by_bit in zip(whole.keys + whole.values, pieces.keys + pieces.values, strict=True):
        filled = 3 * PREFILL_CHUNK
        np.testing.assert_array_equal(at_once[:, :, :filled], bit_by_bit[:, :, :filled])


def test_a_prefix_has_the_same_bits_whatever_follows_it_and_whoever_asks(tiny, prompt) -> None:
    ids = prompt(150)
    long, _ = prefilled(tiny.plain, [ids, prompt(9)], [(0, 3)])
    short, _ = prefilled(tiny.plain, [ids[:64], prompt(200)], [(0, 4)])
    for one, other in zip(long.keys + long.values, short.keys + short.values, strict=True):
        np.testing.assert_array_equal(one[0, :, :64], other[0, :, :64])


@dataclass
class Decoder:
    """Decodes after two prompts, each of three tokens; every call starts anew."""

    model: Any

    def __call__(
        self,
        done: tuple[bool, bool] = (False, False),
        limits: tuple[int, int] = (NEVER, NEVER),
        eos_ids: tuple[list[int], list[int]] = ([], []),
        count: int = 8,
    ) -> list[list[int]]:
        cache, _ = prefilled(self.model, [[1, 2, 3], [4, 5, 6]], [(0, 1)])
        _, made = contiguous_batch.decode(
            self.model.weights,
            cache,
            np.array([7, 8], np.int32),
            np.array([3, 3], np.int32),
            np.array(done),
            np.array(limits, np.int32),
            np.array([ids + [-1] * (4 - len(ids)) for ids in eos_ids], np.int32),
            SamplingArrays.of([SamplingParams(seed=0)] * 2),
            np.int32(count),
            self.model.config,
        )
        return np.asarray(made).tolist()


@pytest.fixture
def decode(tiny) -> Decoder:
    return Decoder(tiny.plain)


def padded(tokens: list[int]) -> list[int]:
    return tokens + [-1] * (contiguous_batch.DECODE_BLOCK - len(tokens))


@pytest.mark.parametrize("count", [0, 1, 5, contiguous_batch.DECODE_BLOCK])
def test_decode_makes_as_many_tokens_as_it_is_asked_for(count: int, decode: Decoder, tiny) -> None:
    expected = [tiny.naive_greedy(tiny.plain, ids, count) for ids in ([1, 2, 3, 7], [4, 5, 6, 8])]
    assert decode(count=count) == [padded(row) for row in expected]


def test_decode_leaves_out_rows_that_have_ended(decode: Decoder) -> None:
    alone, _ = decode()
    assert decode(done=(False, True)) == [alone, padded([])]
    assert decode(done=(True, True)) == [padded([])] * 2


def test_decode_ends_a_row_at_its_limit(decode: Decoder) -> None:
    first, second = decode()
    assert decode(limits=(6, NEVER)) == [padded(first[:3]), second]
    assert decode(limits=(4, 5)) == [padded(first[:1]), padded(second[:2])]


@pytest.mark.parametrize("place", [0, 3])
def test_decode_ends_a_row_after_any_of_its_own_end_of_text_ids(place: int, decode: Decoder) -> None:
    first, second = decode()
    end = next(at for at in range(1, 8) if first[at] not in first[:at])
    ids = [first[end] if at == place else 271 - at for at in range(4)]
    assert not set(ids[:place] + ids[place + 1 :]) & {*first, *second}
    assert decode(eos_ids=(ids, [])) == [padded(first[: end + 1]), second]


def test_slots_that_nobody_sees_take_up_no_memory(tiny: Any) -> None:
    """On a CPU with kernels; a gigabyte would be seen."""
    statm = Path("/proc/self/statm")
    model = tiny.plain
    shape = (1, model.config.num_kv_heads, 1 << 21, 16)
    config = replace(model.config, num_layers=4, head_dim=16)
    backend = select_backend(abstract_weights(config), config, model.placement)
    if not statm.exists() or not backend.reads_filled_only:
        pytest.skip("no kernels, or the system does not say what memory a process has")
    before = int(statm.read_text().split()[1])
    cache = jax.block_until_ready(contiguous_batch.empty_cache(shape, np.dtype("float32"), config, backend))
    assert sum(array.nbytes for array in cache.keys + cache.values) >= 1 << 30
    assert (int(statm.read_text().split()[1]) - before) * os.sysconf("SC_PAGE_SIZE") < 1 << 28
