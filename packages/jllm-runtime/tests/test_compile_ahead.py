"""Programs compiled side by side and ahead: the calls that follow compile nothing."""

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from jllm_core.backends.base import XLA
from jllm_runtime import Model, SamplingParams, batch_compiler, generate, generation
from jllm_runtime.batch_compiler import BatchCompiler, compile_ahead
from jllm_runtime.cache.contiguous import prefill_chunks
from jllm_runtime.cli import cli
from jllm_runtime.compile_ahead import BackgroundCompilation, compile_together
from jllm_runtime.errors import RequestError

MakePrompt = Callable[..., list[int]]


class Fake:
    """What was lowered, and compiles to its own name when ``ready`` lets it."""

    def __init__(self, name: str, ready: Callable[[], Any] = lambda: None) -> None:
        self._name, self._ready = name, ready

    def compile(self) -> str:
        self._ready()
        return self._name


def fail(message: str = "no room") -> NoReturn:
    raise RuntimeError(message)


def test_programs_are_compiled_side_by_side_and_told() -> None:
    both = threading.Barrier(2, timeout=20)  # neither is done before the other has begun
    told: list[str] = []
    compiled = compile_together(
        {name: partial(Fake, name, both.wait) for name in ("prefill", "decode")},
        lambda name, seconds: told.append(name),
    )
    assert list(compiled.items()) == [("prefill", "prefill"), ("decode", "decode")]
    assert sorted(told) == ["decode", "prefill"]
    assert compile_together({}) == {}


@pytest.mark.parametrize("broken", [lambda: fail(), lambda: Fake("decode", fail)], ids=["lowering", "compiling"])
def test_an_error_names_the_program(broken: Callable[[], Any]) -> None:
    told: list[str] = []
    programs: Any = {"prefill": lambda: Fake("prefill"), "decode": broken}
    with pytest.raises(RuntimeError, match="no room") as error:
        compile_together(programs, lambda name, seconds: told.append(name))
    assert error.value.__notes__ == ["The program is decode."]
    assert told == ["prefill"]


def test_what_fails_in_the_background_is_left_out() -> None:
    done: list[str] = []
    programs: Any = {"growth": fail, "decode": lambda: Fake("decode", lambda: done.append("decode"))}
    BackgroundCompilation(programs).wait()
    assert done == ["decode"]


def compiled_programs(caplog: pytest.LogCaptureFixture) -> Counter[tuple[str, bool]]:
    """The programs of ``generate`` that were compiled, and whether that was on another thread."""
    found: Counter[tuple[str, bool]] = Counter()
    for record in caplog.records:
        match = re.match(r"Finished XLA compilation of jit\((\w+)\)", record.getMessage())
        if match and match[1] in ("prefill", "first_token", "decode", "decode_by_lookup", "grow_cache"):
            found[match[1], str(record.threadName).startswith("jllm-compile")] += 1
    return found


@pytest.mark.parametrize("lookup", [0, 3])
def test_the_calls_find_what_was_compiled(
    lookup: int, tiny: Any, prompt: MakePrompt, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a batch that grows: every program is compiled once, and on another thread."""
    # Of no other test's size, so that no program is there already.
    model = tiny.random(dataclasses.replace(tiny.config, num_layers=1, vocab_size=280 + lookup, context_length=600))
    prompts, params = (
        [prompt(150), *[prompt(20)] * (1 + lookup)],
        SamplingParams(max_tokens=120, temperature=0.8, seed=1),
    )
    ask = partial(generate, model, prompts, params, lookup=lookup)
    monkeypatch.setattr(generation, "_compiler", BatchCompiler)
    with caplog.at_level(logging.DEBUG, logger="jax"), jax.log_compiles():
        ahead = ask()
    decode = "decode_by_lookup" if lookup else "decode"
    # Many rows take their prompts in chunks of one size.
    expected = {"prefill": 1 if lookup else 2, "first_token": 1, decode: 2, "grow_cache": 1}
    assert compiled_programs(caplog) == {(name, True): count for name, count in expected.items()}
    monkeypatch.undo()
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="jax"), jax.log_compiles():
        plain = ask()
    assert not compiled_programs(caplog)
    assert [output.token_ids for output in ahead] == [output.token_ids for output in plain]


class Accelerator(XLA):
    """Whose steps take no less time for fewer tokens, as a TPU's."""

    prefill_tokens = 512
    min_step_tokens = 240


def test_chunks_for_prompts_of_every_length_are_compiled_ahead(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.random(dataclasses.replace(tiny.config, num_layers=1, context_length=2048))
    monkeypatch.setattr(Model, "backend", Accelerator(model.placement))
    named: list[str] = []
    monkeypatch.setattr(batch_compiler, "compile_together", lambda programs, _: named.extend(programs))
    batch_compiler.compile_ahead(model)
    needed = {
        f"prefill in chunks of {size}, {capacity} slots"
        for capacity in (256, 512, 1024, 2048)
        for tokens in range(1, capacity)
        for size, _, _ in prefill_chunks(1, tokens, capacity, model.backend)
    }
    assert {name for name in named if name.startswith("prefill")} == needed
    assert len(needed) == 7


@pytest.mark.parametrize(
    ("platform", "processes", "is_ahead"), [("cpu", 1, False), ("gpu", 1, True), ("tpu", 4, False)]
)
def test_who_compiles_ahead(platform: str, processes: int, is_ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has no cores to spare, and several processes compile in one order."""
    device = SimpleNamespace(platform=platform)
    batch: Any = SimpleNamespace(model=SimpleNamespace(mesh=SimpleNamespace(devices=np.array([device]))))
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    assert (generation._compiler(batch) is not None) is is_ahead


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": 17}, "batch must be from 1 to 16, got 17"),
        ({"context": 301}, "context must be from 1 to 300, got 301"),
        ({"context": 0}, "context must be from 1 to 300, got 0"),
        ({"lookup": 99}, "lookup"),
    ],
)
def test_what_cannot_be_compiled_is_refused(given: dict[str, int], message: str, tiny: Any) -> None:
    with pytest.raises(RequestError, match=message):
        compile_ahead(tiny.plain, **given)


GENERATE = """
import logging, sys
missed = []
class Note(logging.Handler):
    def emit(self, record):
        message = record.getMessage()
        if "PERSISTENT COMPILATION CACHE MISS" in message:
            missed.append(message.split("'")[1])
for name in ("jax", "jax._src.compiler"):
    logging.getLogger(name).setLevel(logging.DEBUG)
logging.getLogger("jax").addHandler(Note())
logging.getLogger("jax").propagate = False
from jllm_runtime import SamplingParams, generate, load_model
model = load_model(sys.argv[1], progress=False)
params = SamplingParams(max_tokens=170, ignore_eos=True)
found = []
for prompts in ([[5, 6, 7] * 40], [[5], [6]]):
    outputs = generate(model, prompts, params, progress=False)
    found.append([len(outputs[0].token_ids), sorted(set(missed))])
import json
print(json.dumps(found))
"""


def run_with_cache(cache: Path, *arguments: str) -> str:
    """The output of another Python, whose compiled programs are kept in this folder."""
    environment = {**os.environ, "JLLM_CACHE": str(cache), "JAX_ENABLE_COMPILATION_CACHE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_later_process_compiles_none_of_what_the_command_has(friendly_checkpoint: Path, tmp_path: Path) -> None:
    run = partial(run_with_cache, tmp_path / "cache")
    told = run("-m", "jllm_runtime", "compile", str(friendly_checkpoint), "--context", "300")
    assert re.search(r"decode, \d+ slots: \d+\.\d s", told)
    alone, two = json.loads(run("-c", GENERATE, str(friendly_checkpoint)).splitlines()[-1])
    names = {"jit_prefill", "jit_decode", "jit_first_token", "jit_grow_cache", "jit_empty_cache"}
    assert alone[0] == 170
    assert not names & set(alone[1])
    # Two rows are other programs, which nobody has asked for.
    assert {"jit_prefill", "jit_decode"} <= set(two[1])


SERVE = """
import json, sys
from jllm_runtime import Engine, EngineConfig, SamplingParams, load_model
with Engine(load_model(sys.argv[1], progress=False), EngineConfig(max_batch=2, pages=int(sys.argv[2]))) as engine:
    engine.generate([[5, 6, 7] * 30, [5]], SamplingParams(max_tokens=3))
print(json.dumps([0, sorted(set(missed))]))
"""


def test_a_later_engine_compiles_none_of_what_the_command_has(friendly_checkpoint: Path, tmp_path: Path) -> None:
    run = partial(run_with_cache, tmp_path / "cache")
    told = run("-m", "jllm_runtime", "compile", str(friendly_checkpoint), "--serve", "--batch", "2")
    pages = re.fullmatch(r"programs of the engine with ([\d,]+) pages: \d+\.\d s\n", told)
    assert pages is not None
    listening = GENERATE[: GENERATE.index("from jllm_runtime import")]
    _, missed = json.loads(run("-c", listening + SERVE, str(friendly_checkpoint), pages[1].replace(",", "")))
    assert not {"jit_prefill_pages", "jit_decode_rows"} & set(missed)
    assert "jit_empty_pages" in missed  # else nothing was listened to


def test_options_of_generate_are_not_for_an_engine() -> None:
    result = CliRunner().invoke(cli, ["compile", "nowhere", "--serve", "--context", "64"])
    assert result.exit_code == 2
    assert "leave them out, or --serve" in result.output
