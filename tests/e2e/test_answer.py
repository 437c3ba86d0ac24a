"""From the file that a publisher ships to an answer, by the commands alone."""

import json
import re
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
