"""The examples, run as their readers run them, on the real model."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "script.py")
ANSWER = "The capital of France is Paris."

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def example(run: Run, tmp_path: Path) -> Callable[..., str]:
    """``example("batch.py", ...)``: the standard output of an example, which must end well."""

    def run_example(name: str, *arguments: object) -> str:
        done = run(str(EXAMPLES / name), *arguments)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    return run_example


def test_the_readme_names_every_example() -> None:
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [name for name in (*SCRIPTS, "script.py") if f"[`{name}`]({name})" not in readme] == []


def test_batch(example: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("What is the capital of France?\n\n  Name a colour.\n", encoding="utf-8")
    example("batch.py", prompts, out, "--max-tokens", 12)
    first, second = (json.loads(line) for line in out.read_text(encoding="utf-8").splitlines())
    assert first == {"prompt": "What is the capital of France?", "text": ANSWER, "finish_reason": "stop"}
    assert (second["prompt"], second["finish_reason"]) == ("Name a colour.", "length")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "prompts.txt"]

    # Bad input is told before a model is loaded, and nothing is written.
    prompts.write_text("\n", encoding="utf-8")
    assert exit_code("batch.py", str(prompts), str(tmp_path / "other.jsonl")) == 2
    assert "has no prompts" in capsys.readouterr().err
    assert not list(tmp_path.glob("other*"))


def test_stream_async(example: Callable[..., str]) -> None:
    questions = ("What is the capital of France?", "Name three colours.", "Name three animals.")
    output = example("stream_async.py", *questions, "--max-tokens", 24)
    pieces, _, answers = output.partition("\n\n")
    numbers = [line.split(":")[0][-1] for line in pieces.splitlines()]
    assert set(numbers) == {"1", "2", "3"}
    seconds = [float(line.split(" s")[0]) for line in pieces.splitlines() if re.match(r" *[\d.]+ s  \d: ", line)]
    assert len(seconds) > 8
    assert seconds == sorted(seconds)
    # The long answers are made at the same time: neither's pieces come all before the other's.
    long = [number for number in numbers if number != "1"]
    assert long not in (sorted(long), sorted(long, reverse=True))
    assert f"What is the capital of France?\n{ANSWER}\n" in answers


def test_hidden_states(example: Callable[..., str], tmp_path: Path) -> None:
    import numpy as np

    output = example("hidden_states.py", "The capital of France is", "--save", tmp_path / "states.npz")
    layers = [line for line in output.splitlines() if line.startswith("layer")]
    assert len(layers) == 30
    assert layers[-1].endswith("' Paris'")
    assert "the model says     ' Paris'" in output
    saved = np.load(tmp_path / "states.npz")
    assert saved["last_states"].shape == (30, 576)
    assert saved["attention"].sum() == pytest.approx(1, abs=1e-3)


def test_perplexity(example: Callable[..., str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. The capital of Italy is Rome. " * 3, encoding="utf-8")
    output = example("perplexity.py", text, "--window", 32)
    # Without "The", which nothing comes before.
    assert "42 tokens scored, 183 bytes" in output
    # The capitals are known, and what is repeated is no surprise: half of a window sees each sentence before.
    assert 1 < float(output.split("perplexity ")[1].split(",")[0]) < 5


def test_perplexity_windows_score_every_token_once() -> None:
    windows = load_example("perplexity").windows
    for count, size in ((2, 2), (17, 4), (64, 64), (65, 64), (100, 16), (9, 3)):
        scored = []
        for start, end, first in windows(count, size):
            assert end - start <= size
            # A token is predicted from at least half a window of text, or from all that there is.
            assert first - start >= min(first, size // 2)
            scored += range(first, end)
        assert scored == [*range(1, count)]


def test_structured(example: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example("structured.py") == "Person(name='Ada Lovelace', city='London', born=1815)\n"
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"', encoding="utf-8")
    assert exit_code("structured.py", "--schema", str(schema)) == 2
    assert "is not a JSON schema" in capsys.readouterr().err


def test_search(run: Run, tmp_path: Path) -> None:
    (tmp_path / "science").mkdir()
    (tmp_path / "science" / "plants.md").write_text(
        "# Plants\n\nPlants make sugar from light, water and air.\n\nThe cat sleeps on the sofa all day.\n"
    )
    (tmp_path / "news.txt").write_text(
        "Interest rates rose by a quarter of a point.\n\nThe team won the match by two goals."
    )
    (tmp_path / "data.bin").write_bytes(b"\xff\x00")
    done = run(str(EXAMPLES / "search.py"), tmp_path, "Who won the game?", "--top", 2)
    assert (done.returncode, "5 of 5 paragraphs" in done.stderr) == (0, True), done.stderr
    first, second = done.stdout.splitlines()
    assert "news.txt: The team won" in first
    assert float(first.split()[0]) > float(second.split()[0])


def test_agent(example: Callable[..., str]) -> None:
    step, answer = example("agent.py", "What is 1234 * 5678?").splitlines()
    assert step == '1. {"tool":"calculate","arguments":{"expression":"1234 * 5678"}} -> 7006652'
    assert answer == "1234 * 5678 is 7006652."


def test_mesh8(example: Callable[..., str]) -> None:
    output = example("mesh8.py", "--mesh", "data=2,tensor=4", "--max-tokens", 4)
    assert "8 devices (cpu), mesh data=2, expert=1, tensor=4" in output
    # A quarter of the width of the feed-forward part each; the nine heads are whole on every device.
    assert re.search(r"ffw\.w_gate\.values +\(288, 1536\) +\(288, 384\)", output)
    assert re.search(r"attn\.q\.values +\(288, 9, 64\) +\(288, 9, 64\)", output)
    assert output.count("(as on one device)") == 4


def load_example(name: str) -> ModuleType:
    """An example as a module, to try its functions."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


def exit_code(name: str, *arguments: str) -> object:
    """The exit code of an example that is run in this process, which has JAX already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        patch.syspath_prepend(EXAMPLES)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return end.value.code


def scripted(*texts: str) -> Callable[..., str]:
    """A model that writes these texts, whatever it is asked; it keeps what it was asked."""
    left = [*texts]

    def ask(messages: list[dict[str, str]], schema: dict[str, object]) -> str:
        ask.asked.append((messages[-1]["content"], len(schema["anyOf"])))  # type: ignore[attr-defined, arg-type]
        return left.pop(0)

    ask.asked = []  # type: ignore[attr-defined]
    return ask


def test_the_agent_goes_on_with_whatever_the_model_writes() -> None:
    agent = load_example("agent")
    tools = {"calculate": agent.calculate, "today": agent.today}
    ask = scripted(
        '{"tool": "calculate", "arguments": {"expression": "2 * (3 - 1) / 4"}}',
        '{"tool": "calculate", "arguments": {"expression": "1 / 0"}}',
        '{"tool": "calculate", "arguments": {"expression": "__import__(\'os\')"}}',
        '{"tool": "calculate", "arguments": {"expres',  # cut off
        '{"tool": "none", "arguments": {}}',
        '{"answer": "One."}',
    )
    assert agent.run_agent(ask, "What is it?", tools, 8) == "One."
    said = [content for content, _ in ask.asked]
    assert said[:2] == ["What is it?", "The result is 1.0."]
    assert said[2].startswith("The result is error: ZeroDivisionError")
    assert "cannot compute \"__import__('os')\"" in said[3]
    assert said[4].startswith("The result is error: JSONDecodeError")
    assert said[5].startswith("The result is error: KeyError: 'none'")
    # A tool first, then a tool or the answer; so the grammar has two and three forms.
    assert [forms for _, forms in ask.asked] == [2, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(("expression", "value"), [("-3 * -(1 + 1)", "6"), ("2 - -+1.5", "3.5"), ("-(2) / 4", "-0.5")])
def test_the_agent_computes_with_signs(expression: str, value: str) -> None:
    assert load_example("agent").calculate(expression) == value
    with pytest.raises(ValueError, match="cannot compute '~1'"):
        load_example("agent").calculate("~1")


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_agents_last_step_is_the_answer(steps: int) -> None:
    agent = load_example("agent")
    call = '{"tool": "today", "arguments": {}}'
    ask = scripted(*[call] * (steps - 1), '{"answer": "now"}')
    assert agent.run_agent(ask, "When?", {"today": agent.today}, steps) == "now"
    assert ask.asked[-1][1] == 1
    # A model without a grammar may miss that, too.
    assert agent.run_agent(scripted(*[call] * steps), "When?", {"today": agent.today}, steps) == "(no answer)"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("stream_async.py", ["--model", "none"]),
        ("search.py", [".", "What?"]),
        ("search.py", ["none", "What?"]),
        ("search.py", [".", "What?", "--top", "0"]),
        ("batch.py", ["prompts", "prompts"]),
        ("batch.py", ["prompts", "."]),
        ("batch.py", ["prompts", os.devnull]),
        ("hidden_states.py", ["--save", "none/x.npz"]),
        ("agent.py", ["--max-steps", "0"]),
        ("perplexity.py", ["none.txt"]),
    ],
)
def test_bad_input_is_one_sentence(
    name: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").write_text("Why?\n")
    assert exit_code(name, *arguments) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["prompts"]
    assert (tmp_path / "prompts").read_text() == "Why?\n"
    said = capsys.readouterr()
    assert said.err.startswith("Error: ")
    assert said.out == ""


def test_ctrl_c_is_clean(cache_folder: Path) -> None:
    command = [sys.executable, EXAMPLES / "stream_async.py", "Tell me a long story.", "--max-tokens", "4000"]
    environment = {**os.environ, "JLLM_CACHE": str(cache_folder)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert " s  1: " in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "stopped"
    assert "Traceback" not in said
    assert time.monotonic() - start < 30


def test_output_that_nobody_reads_any_more_ends_an_example(cache_folder: Path) -> None:
    command = [sys.executable, EXAMPLES / "stream_async.py", "Count to three.", "--max-tokens", "8"]
    environment = {**os.environ, "JLLM_CACHE": str(cache_folder)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
    assert (process.returncode, "Traceback" in said) == (141, False), said


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(name, "--help") == 0
    assert "usage:" in capsys.readouterr().out
