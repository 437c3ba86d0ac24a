"""From the file that a publisher ships to an answer, by the commands alone."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."


def test_generate_streams_the_answer_and_keeps_the_timings_apart(run, smollm2_folder):
    result = run("jllm", "generate", smollm2_folder, "--prompt", QUESTION)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ANSWER + "\n"
    assert re.search(r"prefill 37 tokens at \d+/s, decode 8 tokens at [\d.]+/s, stop", result.stderr)


def test_generate_json_is_one_object(run, smollm2_folder):
    result = run("jllm", "generate", smollm2_folder, "--prompt", QUESTION, "--json")
    output = json.loads(result.stdout)
    assert set(output) == {"text", "token_ids", "prompt_token_ids", "finish_reason", "timings"}
    assert (output["text"], output["finish_reason"], output["token_ids"][-1]) == (ANSWER, "stop", 2)
    assert len(output["prompt_token_ids"]) == 37
    assert output["timings"]["load_s"] > 0
    assert output["timings"]["decode_tokens_per_s"] > 0


def test_generate_takes_a_gguf_file_and_converts_it_once(run, smollm2_gguf, cache_folder):
    first = run("jllm", "generate", smollm2_gguf, "--prompt", QUESTION)
    assert first.stdout == ANSWER + "\n", first.stderr
    converted = list((cache_folder / "converted").iterdir())
    changed = converted[0].stat().st_mtime_ns
    assert run("jllm", "generate", smollm2_gguf, "--prompt", QUESTION).stdout == ANSWER + "\n"
    assert list((cache_folder / "converted").iterdir()) == converted
    assert converted[0].stat().st_mtime_ns == changed


def test_a_raw_prompt_from_a_file_and_a_stop_string(run, smollm2_folder, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The days of the week are Monday, Tuesday,", encoding="utf-8")
    result = run("jllm", "generate", smollm2_folder, "--raw", "--prompt-file", prompt, "--stop", "Friday", "--json")
    output = json.loads(result.stdout)
    assert output["text"] == " Wednesday, Thursday, "
    assert output["finish_reason"] == "stop"


def test_a_seed_repeats_and_another_one_differs(run, smollm2_folder):
    def text(seed: int) -> str:
        options = ("--temperature", 1.2, "--seed", seed, "--max-tokens", 24)
        return run("jllm", "generate", smollm2_folder, "--prompt", "Tell me a story.", *options).stdout

    assert text(5) == text(5) != text(6)


def test_the_demo_ends_with_the_answer_and_the_speed(run):
    result = run(Path(__file__).parents[2] / "examples" / "demo.py")
    assert result.returncode == 0, result.stderr
    *_, answer, speed = result.stdout.strip().splitlines()
    assert answer.strip() == ANSWER
    assert re.fullmatch(r"4\. prefill \d+ tokens/s \(37 tokens\), decode [\d.]+ tokens/s \(8 tokens\)", speed)


def test_a_second_start_compiles_nothing(run, smollm2_folder, cache_folder):
    run("jllm", "generate", smollm2_folder, "--prompt", QUESTION)
    programs = {path.name for path in (cache_folder / "xla").iterdir() if path.name.endswith("-cache")}
    assert programs
    run("jllm", "generate", smollm2_folder, "--prompt", QUESTION)
    assert {path.name for path in (cache_folder / "xla").iterdir() if path.name.endswith("-cache")} == programs


class Terminal:
    """A command on a terminal of its own, as a person has it."""

    def __init__(self, *arguments: object, cache: Path) -> None:
        self._main, child = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jllm_runtime.cli", *map(str, arguments)],
            stdin=child,
            stdout=child,
            stderr=child,
            env={**os.environ, "JLLM_CACHE": str(cache), "TERM": "dumb"},
            start_new_session=True,
        )
        os.close(child)
        self.screen = ""
        self._seen = 0

    def wait_for(self, text: str, timeout: float = 120) -> None:
        """Read on until the text comes, after whatever was waited for before."""
        end = time.monotonic() + timeout
        while text not in self.screen[self._seen :]:
            assert time.monotonic() < end, f"no {text!r} on the screen:\n{self.screen}"
            if select.select([self._main], [], [], 0.2)[0]:
                self.screen += os.read(self._main, 4096).decode(errors="replace")
        self._seen = self.screen.index(text, self._seen) + len(text)

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    def interrupt(self, until: str) -> None:
        """Press Ctrl-C until the text comes: one that arrives just before the program waits for a key is only seen with
        the next key."""
        for _ in range(20):
            os.kill(self._process.pid, signal.SIGINT)
            try:
                return self.wait_for(until, timeout=3)
            except AssertionError:
                continue
        self.wait_for(until, timeout=0)

    def close(self) -> int:
        try:
            return self._process.wait(timeout=60)
        finally:
            self._process.kill()
            os.close(self._main)


def test_chat_remembers_resets_and_survives_ctrl_c(smollm2_folder, cache_folder):
    terminal = Terminal("chat", smollm2_folder, "--max-tokens", 400, cache=cache_folder)
    terminal.wait_for(">>> ")
    terminal.type("/help\n")
    terminal.wait_for("/reset")
    terminal.wait_for(">>> ")
    terminal.type(f"{QUESTION}\n")
    terminal.wait_for(ANSWER)
    terminal.wait_for(">>> ")
    terminal.type("Write a very long story about a dragon and a knight.\n")
    terminal.wait_for("and a knight.")  # as typed
    terminal.wait_for(" the ")
    terminal.interrupt(until="(stopped)")
    terminal.wait_for(">>> ")
    terminal.type("/reset\n")
    terminal.wait_for("forgotten")
    terminal.wait_for(">>> ")
    terminal.type(f"{QUESTION}\n")
    terminal.wait_for(ANSWER)
    terminal.wait_for(">>> ")
    terminal.interrupt(until="Ctrl-D or /exit leaves")
    terminal.type("/exit\n")
    assert terminal.close() == 0


@pytest.mark.parametrize(("bits", "most_kl"), [("int8", 0.005), ("int4", 0.1)])
def test_quantised_weights_still_answer(run, smollm2_gguf, tmp_path, bits, most_kl):
    """The file's matrices are Q4_1: int4 keeps their grid, int8 is a rounding of its own."""
    converted = run("jllm-convert", "convert", smollm2_gguf, tmp_path / bits, "--quantize", bits)
    assert converted.returncode == 0, converted.stderr
    receipt = json.loads((tmp_path / bits / "manifest.json").read_text())["receipt"]
    assert 0 <= receipt["kl_nats"] < most_kl
    assert receipt["tokens"] == 512
    assert f"mean KL {receipt['kl_nats']:.4f} nats" in converted.stdout
    assert run("jllm", "generate", tmp_path / bits, "--prompt", QUESTION).stdout == ANSWER + "\n"
