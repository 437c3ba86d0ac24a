"""From the file that a publisher ships to an answer, by the commands alone."""

import json
import os
import re
import shutil
import subprocess
import sys
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
    known = {"text", "token_ids", "prompt_token_ids", "finish_reason", "timings", "reasoning", "sampling", "backend"}
    assert set(output) == known
    # SmolLM2's publisher recommends nothing.
    assert (output["sampling"]["temperature"], output["sampling"]["max_tokens"]) == (0, 2048)
    assert (output["text"], output["finish_reason"], output["token_ids"][-1]) == (ANSWER, "stop", 2)
    assert len(output["prompt_token_ids"]) == 37
    assert output["timings"]["load_s"] > 0
    assert output["timings"]["decode_tokens_per_s"] > 0


def test_generate_takes_a_gguf_file_and_converts_it_once(run, smollm2_gguf, cache_folder, tmp_path):
    def models() -> list[Path]:
        return [path for path in (cache_folder / "converted").iterdir() if not path.name.startswith(".")]

    shutil.rmtree(cache_folder / "converted", ignore_errors=True)  # the tests of another file may have converted it
    first = run("jllm", "generate", smollm2_gguf, "--prompt", QUESTION)
    assert first.stdout == ANSWER + "\n", first.stderr
    (converted,) = models()
    # It stays as small as the file is: 98 MB, of which the numbers are 94.9.
    line = f"converted {smollm2_gguf.name} (weights in Q4_1) to {converted}: 94.9 MB, "
    assert f"{line}int4-g32-offsets-embedding8 and bfloat16; `jllm cache` lists and removes\n" in first.stderr
    changed = converted.stat().st_mtime_ns
    # Under another name, and with another date: it is known by its contents.
    copy = shutil.copyfile(smollm2_gguf, tmp_path / "renamed.gguf")
    again = run("jllm", "generate", copy, "--prompt", QUESTION)
    assert again.stdout == ANSWER + "\n", again.stderr
    assert "converted" not in again.stderr
    assert models() == [converted]
    assert converted.stat().st_mtime_ns == changed


def test_no_cache_leaves_no_conversion(run, smollm2_gguf, cache_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = sorted((cache_folder / "converted").glob("*"))
    result = run("jllm", "generate", smollm2_gguf, "--prompt", QUESTION, "--no-cache")
    assert result.stdout == ANSWER + "\n", result.stderr
    assert f"to {tmp_path}" in result.stderr
    assert list(tmp_path.glob("jllm-*")) == []
    assert sorted((cache_folder / "converted").glob("*")) == before


def test_the_cache_is_listed_and_removed(smollm2_gguf, tmp_path):
    environment = {**os.environ, "JLLM_CACHE": str(tmp_path)}

    def jllm(*arguments: object) -> str:
        command = [sys.executable, "-m", "jllm_runtime.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    jllm("generate", smollm2_gguf, "--prompt", QUESTION, "--max-tokens", 1)
    entries = {entry["kind"]: entry for entry in json.loads(jllm("cache", "--json"))["entries"]}
    assert 90e6 < entries["model"]["bytes"] < 100e6
    assert entries["programs"]["bytes"] > 0
    assert "removed SmolLM2-135M-Instruct.Q4_1-" in jllm("cache", "remove", "SmolLM2")
    assert "removed xla" in jllm("cache", "remove", "--programs")
    assert json.loads(jllm("cache", "--json"))["entries"] == []


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
    assert re.fullmatch(r"4\. prefill \d+ tokens/s \(37 tokens\), decode [\d.]+ tokens/s \(8 tokens\), by .+", speed)


def test_a_second_start_compiles_nothing(run, smollm2_folder, cache_folder):
    run("jllm", "generate", smollm2_folder, "--prompt", QUESTION)
    programs = {path.name for path in (cache_folder / "xla").iterdir() if path.name.endswith("-cache")}
    assert programs
    run("jllm", "generate", smollm2_folder, "--prompt", QUESTION)
    assert {path.name for path in (cache_folder / "xla").iterdir() if path.name.endswith("-cache")} == programs


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
