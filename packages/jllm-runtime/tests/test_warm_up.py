"""Warm-up of the engine: what is compiled before the first request, and the pages that fit beside it."""

import dataclasses
import logging
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jllm_runtime import Engine, EngineConfig, EngineError, SamplingParams
from jllm_runtime.cache.contiguous import cache_info
from jllm_runtime.embedding import TOKENS_AT_A_TIME
from jllm_runtime.engine import warm_up
from jllm_runtime.engine.pool_size import fitted_pages
from jllm_runtime.engine.warm_up import prepared_pages
from jllm_runtime.programs import paged_batch
from jllm_runtime.programs.paged_sizes import reserved_bytes

SMALL = EngineConfig(max_batch=2, batch_sizes=(1, 2), pages=12, page_size=16, warm_up=True)
PROGRAMS = ("prefill_pages", "decode_rows")


@pytest.fixture
def log_compiles() -> Iterator[None]:
    """JAX says what it compiles, in every thread."""
    jax.config.update("jax_log_compiles", True)
    yield
    jax.config.update("jax_log_compiles", False)


def compiled(records: list[logging.LogRecord]) -> list[str]:
    """Names of the engine's programs that JAX says that it compiles, in order."""
    said = [record.getMessage() for record in records]
    return [name for text in said for name in PROGRAMS if text.startswith(f"Compiling jit({name})")]


def test_no_request_waits_for_a_program(tiny, prompt, caplog: pytest.LogCaptureFixture, log_compiles: None) -> None:
    # Another width than other tests' models have, so that nothing is compiled already.
    model = tiny.random(dataclasses.replace(tiny.config, intermediate_size=48))
    params = SamplingParams(max_tokens=3, temperature=0)
    with caplog.at_level(logging.WARNING), Engine(model, SMALL) as engine:
        # Each once: what is compiled ahead is what the blank rows, and then the requests, run.
        assert sorted(compiled(caplog.records)) == ["decode_rows", "decode_rows", "prefill_pages"]
        caplog.clear()
        first = engine.generate([prompt(40), prompt(9)], params)
        assert compiled(caplog.records) == []
    with Engine(model, dataclasses.replace(SMALL, warm_up=False)) as engine:
        assert engine.generate([prompt(40), prompt(9)], params) is not None
        again = engine.generate([prompt(40), prompt(9)], params)
    assert [output.token_ids for output in first] == [output.token_ids for output in again]


def test_on_a_cpu_programs_are_compiled_when_they_are_needed(tiny) -> None:
    assert not EngineConfig().warms_up(tiny.plain)
    assert prepared_pages(tiny.plain, EngineConfig(pages=5)) == 5


GIB = 2**30


def needs(fixed: int, most: int) -> "tuple[list[int], warm_up.Needs]":
    asked: list[int] = []

    def ask(pages: int) -> int | None:
        asked.append(pages)
        return None if pages > most else fixed

    return asked, ask


def test_pages_that_fit_are_compiled_once() -> None:
    asked, ask = needs(GIB // 2, 10**6)
    assert fitted_pages(900, GIB // 100, 10 * GIB, ask) == 900
    assert asked == [900]


def test_pages_give_way_to_what_the_programs_need() -> None:
    asked, ask = needs(3 * GIB, 10**6)
    found = fitted_pages(900, GIB // 100, 10 * GIB, ask)
    assert asked == [900, found]
    # 97 percent of the memory, less what the programs need, and rounded to four bits.
    assert found == 640 <= (0.97 * 10 * GIB - 3 * GIB) / (GIB // 100)


def test_pages_that_the_compiler_refuses_are_halved() -> None:
    asked, ask = needs(GIB, 300)
    assert fitted_pages(900, GIB // 100, 10 * GIB, ask) == 224
    assert asked == [900, 448, 224]


@pytest.mark.parametrize(
    ("pages", "most", "fixed", "words"),
    [
        (900, 10**6, True, r"900 pages of 10.2 MiB and the programs \(3,072 MiB\) do not fit in the 10,240 MiB"),
        (900, 0, True, r"the programs \(more than there is\)"),
        (900, 0, False, "900 pages .* smaller max_batch or chunk_tokens"),
        (1, 0, False, "1 pages"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_request(pages: int, most: int, fixed: bool, words: str) -> None:
    _, ask = needs(3 * GIB, most)
    with pytest.raises(EngineError, match=words):
        fitted_pages(pages, GIB // 100, 10 * GIB, ask, fixed)


def test_the_pool_is_fitted_to_the_compiled_programs(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(SMALL, pages=None, max_batch=1, batch_sizes=(1,))
    one = warm_up.device_page_bytes(tiny.plain, 16, config.cache_dtype(tiny.plain))
    enough = -(-tiny.config.context_length // 16)
    monkeypatch.setattr(warm_up, "compile_together", lambda programs, _: programs)
    monkeypatch.setattr(warm_up, "needed_bytes", lambda _: 5 * one)
    monkeypatch.setattr(warm_up, "free_bytes", lambda _: 15 * one)
    monkeypatch.setattr(warm_up, "reserved_bytes", lambda *_: 2 * one)
    assert enough > 7
    assert prepared_pages(tiny.plain, config) == 7  # of 0.97 * 15, less 5 and 2
    with pytest.raises(EngineError, match="do not fit"):
        prepared_pages(tiny.plain, dataclasses.replace(config, pages=10))


def test_over_several_processes_no_program_is_compiled_by_one_alone(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(SMALL, warm_up=True)
    assert config.fits_pages(tiny.plain)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(warm_up, "compile_together", None)
    assert prepared_pages(tiny.plain, config) == config.pages


def test_what_requests_take_beside_the_pages_is_as_large_as_its_arrays(tiny) -> None:
    model, rows = tiny.plain, 3
    state = paged_batch.empty_state(rows, model.config.vocab_size, model.placement)
    info = cache_info(model.config, 1, min(TOKENS_AT_A_TIME, model.config.context_length), jnp.dtype("float32"))
    cache = 2 * model.config.num_layers * math.prod(info.shape) * 4
    found = reserved_bytes(model.config, rows, jnp.dtype("float32"), model.placement)
    assert found == sum(array.nbytes for array in jax.tree.leaves(state)) + cache


def test_a_closed_engine_gives_its_pages_back_while_it_is_named(tiny) -> None:
    shape = (13, tiny.config.num_kv_heads, 16, tiny.config.head_dim)

    def pools() -> int:
        return sum(array.shape == shape for array in jax.live_arrays())

    with Engine(tiny.plain, EngineConfig(pages=13, page_size=16, max_batch=2)) as engine:
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=1))
        assert pools() == 2 * tiny.config.num_layers
    assert engine.closed
    assert pools() == 0


def test_what_does_not_fit_is_refused_before_other_processes_are_connected(
    tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise EngineError("do not fit")

    monkeypatch.setattr("jllm_runtime.engine.engine.prepared_pages", refuse)
    monkeypatch.setattr("jllm_runtime.engine.engine.connect_followers", None)
    with pytest.raises(EngineError, match="do not fit"):
        Engine(tiny.plain, SMALL)
