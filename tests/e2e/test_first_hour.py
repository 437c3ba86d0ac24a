"""The first hour of somebody with a GGUF file and nothing else, in order: each test finds what those before it left."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from .page.conftest import Complaints, complaints, opened  # noqa: F401 (a fixture)
from .terminal import ASKS, Terminal

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."

LIBRARY = """
import sys
import jax.monitoring
from jllm_runtime import generate, load_model

misses = []
jax.monitoring.register_event_listener(
    lambda event, **_: misses.append(event) if event == "/jax/compilation_cache/cache_misses" else None
)
model = load_model(sys.argv[1])
print(repr(model))
print(model.chat("What is the capital of France?").text)
print(len(misses))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Path:
    """A folder with the file that was downloaded, and a cache that nobody has used."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copyfile(smollm2_gguf, folder / "SmolLM2.gguf")
    return folder


def conversions(home: Path) -> list[Path]:
    """The checkpoints in the cache."""
    return [manifest.parent for manifest in (home / "cache" / "converted").glob("*/manifest.json")]


@pytest.fixture(scope="module")
def start(home: Path) -> Callable[..., subprocess.Popen[str]]:
    """``start("generate", ...)``: the command jllm, in that folder."""

    def popen(*arguments: object, **options: Any) -> subprocess.Popen[str]:
        environment = {**os.environ, "JLLM_CACHE": str(home / "cache"), **options.pop("env", {})}
        command = [sys.executable, "-m", "jllm_runtime"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        words = [argument if isinstance(argument, bytes) else str(argument) for argument in arguments]
        return subprocess.Popen([*command, *words], cwd=home, env=environment, text=True, **{**pipes, **options})

    return popen


@pytest.fixture(scope="module")
def jllm(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., tuple[int, str, str]]:
    """``jllm("generate", ...)``: its exit code, and what it wrote to standard output and standard error."""

    def run(*arguments: object, stdin: str | None = None, **options: Any) -> tuple[int, str, str]:
        kind = {"stdin": subprocess.DEVNULL if stdin is None else subprocess.PIPE}
        process = start(*arguments, **{**kind, **options})
        out, err = process.communicate(stdin, timeout=300)
        return process.returncode, out, err

    return run


def test_a_plan_reads_the_file_and_converts_nothing(jllm: Any, home: Path) -> None:
    code, out, err = jllm("plan", "SmolLM2.gguf", "--topology", "t4", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert "int4" in json.dumps(plan["assumed"])
    assert not (home / "cache" / "converted").exists()
    # Published models are known by their names, whatever follows them.
    assert jllm("plan", "Qwen/Qwen3-4B-Instruct-2507", "--topology", "2xt4")[0] == 0


def test_three_processes_meet_on_a_cold_cache(start: Any, home: Path) -> None:
    processes = [start("generate", "SmolLM2.gguf", "--prompt", QUESTION) for _ in range(3)]
    ended = [process.communicate(timeout=300) for process in processes]
    assert [out for out, _ in ended] == [f"{ANSWER}\n"] * 3, ended
    assert not any("Traceback" in err for _, err in ended)
    [conversion] = conversions(home)
    # It stays in the bits of the file: 98 MB were 530 MB of float32.
    size = sum(path.stat().st_size for path in conversion.rglob("*") if path.is_file())
    assert size < 1.6 * (home / "SmolLM2.gguf").stat().st_size


def test_a_file_that_was_moved_is_known(jllm: Any, home: Path) -> None:
    (home / "SmolLM2.gguf").rename(home / "smol.gguf")
    code, out, err = jllm("generate", "smol.gguf", "--prompt", QUESTION)
    assert (code, out) == (0, f"{ANSWER}\n"), err
    assert len(conversions(home)) == 1
    # It says how it chose the tokens, and on what.
    assert re.search(r"\[greedy.*prefill .*stop\]", err), err


def test_a_prompt_comes_from_a_pipe_and_a_seed_is_told(jllm: Any) -> None:
    code, out, err = jllm(
        "generate", "smol.gguf", "--json", "--temperature", 1.5, "--max-tokens", 12, stdin="Tell me a story."
    )
    assert code == 0, err
    first = json.loads(out)
    seed = first["sampling"]["seed"]
    again = jllm(
        *("generate", "smol.gguf", "--json", "--temperature", 1.5, "--max-tokens", 12, "--seed", seed),
        stdin="Tell me a story.",
    )
    assert json.loads(again[1])["token_ids"] == first["token_ids"]


def test_a_flag_does_not_take_the_models_name_for_its_value(jllm: Any) -> None:
    code, out, err = jllm("generate", "--lookup", "smol.gguf", "--prompt", QUESTION)
    assert (code, out) == (0, f"{ANSWER}\n"), err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "qwen3-0.6b", "--prompt", "Hi"], "Qwen/Qwen3-0.6B"),
        (["generate", "smol.gguf", "--prompt", b"caf\xe9"], "UTF-8"),
        (["generate", "smol.gguf", "--promt", "Hi"], "--prompt"),
        (["generate", "smol.gguf", "--prompt", "Hi", "--mesh", "tensor=2"], "--devices 2"),
        (["generate", "smol.gguf", "--prompt", "Hi", "--no-think"], "enable_thinking"),
        (["plan", "Qwen3-4B", "--topology", "v5e-5"], "v5e-4"),
    ],
)
def test_what_is_wrong_is_said_in_words(jllm: Any, arguments: list[object], said: str) -> None:
    code, out, err = jllm(*arguments)
    assert (code, out) == (2, ""), err
    assert said in err
    assert "Traceback" not in err


def test_a_cache_that_cannot_be_used_is_named(jllm: Any, home: Path) -> None:
    (home / "taken").write_text("")
    environment = {"JLLM_CACHE": str(home / "taken")}
    code, _, err = jllm("generate", "smol.gguf", "--prompt", QUESTION, env=environment)
    assert code == 2, err
    assert "JLLM_CACHE" in err
    assert "Traceback" not in err
    code, out, err = jllm("generate", "smol.gguf", "--prompt", QUESTION, "--no-cache", env=environment)
    assert (code, out) == (0, f"{ANSWER}\n"), err


def test_an_output_that_takes_no_more_is_no_traceback(jllm: Any, start: Any) -> None:
    with open("/dev/full", "w") as full:
        code, _, err = jllm("generate", "smol.gguf", "--prompt", QUESTION, stdout=full)
    assert (code, "Traceback" in err) == (1, False), err
    with start("plan", "Qwen3-4B", "--topology", "t4") as closed:
        closed.stdout.close()
        assert closed.stderr.read() == ""
        assert closed.wait(timeout=300) == 141


@pytest.mark.parametrize("milliseconds", [10, 50, 400])
def test_an_early_ctrl_c_is_no_traceback(start: Any, milliseconds: int) -> None:
    process = start("generate", "smol.gguf", "--prompt", QUESTION)
    time.sleep(milliseconds / 1000)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    # Before our command begins Python itself ends, in its own words.
    assert process.returncode == 130 or "jllm_runtime/cli.py" not in err, (process.returncode, out, err)
    assert process.returncode != 130 or "Traceback" not in err, err


def test_the_library_compiles_nothing_twice_and_shows_itself_in_a_line(home: Path) -> None:
    [checkpoint] = conversions(home)
    environment = {**os.environ, "JLLM_CACHE": str(home / "cache")}
    command = [sys.executable, "-c", LIBRARY, str(checkpoint)]
    runs = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300).stdout
        for _ in range(2)
    ]
    shown, answer, misses = runs[1].splitlines()
    assert len(shown) < 250
    assert "135M" in shown
    assert (answer, misses) == (ANSWER, "0")


def test_a_benchmark_stays_below_what_the_machine_can(jllm: Any) -> None:
    sizes = ("--prompt-tokens", 64, "--decode-tokens", 16, "--batch", 1, "--context", 128)
    code, out, err = jllm("bench", "smol.gguf", *sizes, "--json")
    assert code == 0, err
    results = json.loads(out)["results"]
    assert all(0 < result["decode_share_of_limit"] <= 1 for result in results)
    assert all(0 < result["prefill_share_of_limit"] <= 1 for result in results)


def test_a_chat_on_a_terminal(home: Path) -> None:
    chat = Terminal("chat", home / "smol.gguf", "--max-tokens", "40", cache=home / "cache")
    try:
        chat.say(QUESTION)
        assert "greedy" in chat.screen
        chat.wait_for(ANSWER)
        # A line of ours begins with a stroke, and so may one for the model.
        chat.say("/reset")
        chat.say("/no_think Write a very long story about a dragon and a knight.")
        chat.wait_for("/continue")
        chat.say("/undo")
        chat.wait_for("/no_think")
        chat.say("/set temperature 0.7")
        chat.wait_for("0.7")
        chat.wait_for(ASKS)
        chat.type("\x04")
        assert chat.close() == 0
    finally:
        chat.kill()


@pytest.fixture
def server(start: Any) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """``jllm serve`` with a key, as it stands in the cache by now."""
    process = start("serve", "smol.gguf", "--port", 0, "--api-key", "sesame", stdout=subprocess.DEVNULL)
    with process.stderr as lines:
        yield next(found[1] for line in lines if (found := re.search(r"at (http://\S+)", line))), process
        process.send_signal(signal.SIGTERM)
        rest = lines.read()
        assert process.wait(timeout=60) == 0, rest


def test_the_page_shows_the_defaults_and_says_when_the_server_stops(
    server: tuple[str, subprocess.Popen[str]],
    browser: Browser,
    complaints: Complaints,  # noqa: F811
) -> None:
    url, process = server
    complaints.expected = ("401", "503", "Failed to load resource", "ERR_CONNECTION_REFUSED")
    with opened(browser, url, complaints) as page:
        key = page.get_by_role("dialog").get_by_role("textbox")
        key.fill("wrong")
        key.press("Enter")
        expect(page.get_by_role("dialog")).to_contain_text("wrong")
        key.fill("sesame")
        key.press("Enter")
        expect(page.get_by_role("spinbutton", name="Temperature")).to_have_attribute("placeholder", "greedy")
        expect(page.get_by_role("spinbutton", name="Max tokens")).to_have_attribute("placeholder", "2048")
        message = page.get_by_role("textbox", name="Your message")
        message.fill(QUESTION)
        message.press("Enter")
        expect(page.get_by_text(ANSWER, exact=True)).to_be_visible(timeout=60_000)
        page.reload()
        expect(page.get_by_text(ANSWER, exact=True)).to_be_visible()
        page.get_by_role("button", name="New conversation").click()
        message.fill("Write a very long story about a dragon and a knight.")
        message.press("Enter")
        expect(page.get_by_text("dragon").nth(2)).to_be_visible(timeout=60_000)
        process.send_signal(signal.SIGTERM)
        expect(page.locator("#notice")).to_contain_text("waiting for 1 answer")
        process.send_signal(signal.SIGTERM)
        expect(page.locator("#notice")).to_contain_text("The server has stopped.", timeout=30_000)
    # Before the fixture ends it: a signal in Python's last moments is no longer the server's.
    assert process.wait(timeout=60) == 0


def test_the_cache_is_listed_and_emptied(jllm: Any, home: Path) -> None:
    code, out, err = jllm("cache", "--json")
    assert code == 0, err
    assert "smol" in out.lower()
    assert jllm("cache", "remove", "--all")[0] == 0
    assert conversions(home) == []
