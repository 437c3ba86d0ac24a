"""The arena of large pages that a model's arrays lie in."""

import gc
import itertools
import threading
from typing import Any

import jax
import numpy as np
import pytest
from jllm_core.checkpoint import restore_weights
from jllm_core.checkpoint.large_pages import REGION_BYTES, XLA_ALIGNMENT, LargePageArena


def addresses(array: np.ndarray) -> range:
    start = array.__array_interface__["data"][0]
    return range(start, start + array.nbytes)


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 7, 11)])
def test_arrays_begin_where_xla_wants_them(shape: tuple[int, ...]) -> None:
    arena = LargePageArena()
    for dtype in ("int8", "float16", "float32"):
        array = arena.empty(shape, dtype)
        assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
        assert array.size == 0 or addresses(array).start % XLA_ALIGNMENT == 0
        assert array.flags.c_contiguous
        assert array.flags.writeable


def test_arrays_of_several_threads_lie_apart() -> None:
    arena, taken = LargePageArena(), []
    threads = [
        threading.Thread(target=lambda: taken.extend(arena.empty((size,), np.int8) for size in range(1, 900)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    places = sorted((addresses(array) for array in taken), key=lambda place: place.start)
    assert len(places) == 4 * 899
    assert all(first.stop <= second.start for first, second in itertools.pairwise(places))


def test_what_is_larger_than_a_region_gets_its_own() -> None:
    arena = LargePageArena()
    first, large, last = (arena.empty((size,), np.int8) for size in (10, REGION_BYTES + 1, 10))
    first[:], large[-1], last[:] = 1, 2, 3
    assert first.tolist() + last.tolist() == [1] * 10 + [3] * 10


def test_loaded_weights_stay_where_they_were_read(
    tmp_path: Any, make_config: Any, make_weights: Any, save_model: Any
) -> None:
    """No copy is made on a CPU: all arrays lie in one region."""
    config = make_config()
    checkpoint = save_model(tmp_path / "model", config, make_weights(config))
    weights = restore_weights(checkpoint, config)
    places = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(weights)]
    total = sum(array.nbytes + XLA_ALIGNMENT for array in jax.tree.leaves(weights))
    assert max(places) - min(places) < total
    kept = weights.embedding
    expected = np.array(kept)
    del weights
    gc.collect()
    np.testing.assert_array_equal(kept, expected)
