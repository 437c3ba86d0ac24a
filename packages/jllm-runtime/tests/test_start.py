"""Start of the commands: what they run on is said first, and what keeps JAX from starting is one sentence."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from jllm_runtime import load_model
from jllm_runtime.cli import main
from jllm_runtime.model_summary import runs_on

# Each starts JAX at another place. A port of 0 is any that is free.
COMMANDS = {
    "generate": ["--prompt", "hi"],
    "chat": [],
    "serve": ["--port", "0"],
    "bench": ["--prompt-tokens", "4"],
}
# Fills the memory that the process gets next with what is no number.
POISON = "import numpy; [numpy.full(2**n, numpy.nan, 'float32') for n in range(8, 24) for _ in range(4)]\n"


def run(command: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "jllm_runtime", command, *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_platform_that_is_not_there_is_one_sentence(command: str, friendly_checkpoint: Path) -> None:
    done = run(command, str(friendly_checkpoint), *COMMANDS[command], JAX_PLATFORMS="nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: JAX cannot start what JAX_PLATFORMS=nonsense names: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("options", [[], ["--json"], ["--raw", "--dtype", "bfloat16"]], ids=" ".join)
def test_generate_says_first_what_it_runs_on(
    options: list[str],
    friendly_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["generate", str(friendly_checkpoint), "--prompt", "hi", "--max-tokens", "1", "--greedy"]
    monkeypatch.setattr("sys.argv", ["jllm", *arguments, "--no-compile-cache", *options])
    main()
    out, err = capsys.readouterr()
    dtype = "bfloat16" if "bfloat16" in options else "float32"
    assert re.match(rf"{re.escape(str(friendly_checkpoint))} on \d+ x cpu, {dtype} \(.*\)\n", err)
    assert " x cpu" not in out


def test_what_a_model_runs_on_has_platform_devices_and_type(friendly_checkpoint: Path) -> None:
    model = load_model(friendly_checkpoint)
    count = model.mesh.size
    assert runs_on(model) == f"{count} x cpu, float32 ({model.backend.name})"


def test_numbers_may_be_checked(friendly_checkpoint: Path, run_python: Callable[..., str]) -> None:
    """``JAX_DEBUG_NANS=1`` looks at all of every array, also at what no program has filled."""
    code = POISON + (
        "from jllm_runtime import Engine, EngineConfig, SamplingParams, load_model\n"
        f"model = load_model({str(friendly_checkpoint)!r})\n"
        "print(model.chat('hi').text)\n"
        "with Engine(model, EngineConfig(pages=64)) as engine:\n"
        "    print(engine.chat('hi', SamplingParams(logprobs=2, repetition_penalty=1.1)).text)\n"
    )
    assert run_python(code, JAX_DEBUG_NANS="1").splitlines() == ["Hi, you!"] * 2


@pytest.mark.parametrize("kernels", ["auto", "xla"])
def test_jax_s_64_bits_change_nothing(kernels: str, friendly_checkpoint: Path) -> None:
    """Other code in a process may need them: ``generate`` and the engine, with all that sampling has."""
    code = (
        "import sys; from jllm_runtime import Engine, SamplingParams, embed, generate, load_model\n"
        "model = load_model(sys.argv[1])\n"
        "params = [SamplingParams(max_tokens=6, seed=5, temperature=1, top_p=0.9, top_k=20, presence_penalty=0.3),\n"
        "          SamplingParams(max_tokens=6, logit_bias={5: 2.0})]\n"
        "print([output.token_ids for output in generate(model, [[1, 2], [3, 4, 5]], params)])\n"
        "with Engine(model) as engine:\n"
        "    print([output.token_ids for output in engine.generate([[1, 2], [3, 4, 5]], params)])\n"
        "print(embed(model, [[1, 2]]).tobytes().hex())\n"
    )
    short, long = (
        subprocess.run(
            [sys.executable, "-c", code, str(friendly_checkpoint)],
            env={**os.environ, "JAX_ENABLE_X64": bits, "JLLM_KERNELS": kernels},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for bits in "01"
    )
    assert long == short
    assert short.count("\n") == 3
