"""Warm-up of the engine: what is compiled before the first request, and the pages that fit beside it."""

import dataclasses
import logging
from collections.abc import Iterator

import jax
import pytest
from jllm_runtime import Engine, EngineConfig, EngineError, SamplingParams
from jllm_runtime.engine import warm_up
from jllm_runtime.engine.pool_size import fitted_pages
from jllm_runtime.engine.warm_up import prepared_pages

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
    assert enough > 9
    assert prepared_pages(tiny.plain, config) == 9  # of 0.97 * 15, less 5
    with pytest.raises(EngineError, match="do not fit"):
        prepared_pages(tiny.plain, dataclasses.replace(config, pages=10))
