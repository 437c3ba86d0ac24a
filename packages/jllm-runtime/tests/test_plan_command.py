"""Command ``jllm plan``, called in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jllm_core import ModelConfig
from jllm_runtime.cli import main
from jllm_runtime.planner.tpu_compiler import Collective, Compilation, Program


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs ``jllm plan`` with these arguments; gives the exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["jllm", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return end.value.code, out, err

    return run


def test_the_json_object_has_the_promised_fields(plan: Callable[..., Any]) -> None:
    code, out, _ = plan("qwen3-14b", "--topology", "v2-8", "--batch", 8, "--context", 4096, "--json")
    told = json.loads(out)
    assert (code, told["fits"], told["short_bytes"], told["alternatives"]) == (0, True, 0, [])
    parts = told["per_device"]
    assert set(parts) == {"weights_bytes", "kv_bytes", "temp_bytes", "total_bytes", "capacity_bytes"}
    assert parts["total_bytes"] == parts["weights_bytes"] + parts["kv_bytes"] + parts["temp_bytes"]
    assert parts["total_bytes"] <= parts["capacity_bytes"] < 8 * 2**30
    assert {"decode_tokens_per_s", "bytes_per_step"} <= set(told["roofline"])
    assert told["largest_batch"] >= 8
    assert told["largest_context"] >= 4096


def test_what_does_not_fit_ends_with_one_and_says_what_would(plan: Callable[..., Any]) -> None:
    code, out, _ = plan("Qwen/Qwen3-32B", "--topology", "v2-8", "--batch", 8)
    assert code == 1
    assert "It does not fit: 1." in out
    assert "GiB short on each device. These would:" in out
    assert "--quantize int8" in out
    assert plan("Qwen/Qwen3-32B", "--topology", "v2-8", "--batch", 8, "--quantize", "int8")[0] == 0


def test_the_table_names_what_was_asked_for(plan: Callable[..., Any]) -> None:
    code, out, _ = plan(
        *("qwen3-30b-a3b", "--topology", "v5e-8", "--batch", 3, "--context", 300, "--quantize", "int4"),
        *("--mesh", "data=2,tensor=4"),
    )
    out = " ".join(out.split())
    assert code == 0
    for words in ("30.53B parameters", "8 x TPU v5 lite, data=2, tensor=4", "weights int4-g32, bfloat16"):
        assert words in out
    assert "batch 3 (runs as 4), context 300 (in a cache of 512)" in out
    assert "It fits." in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["qwen3-15b", "--topology", "v2-8"], "did you mean Qwen/Qwen3-14B"),
        (["qwen3-14b", "--topology", "v2-9"], "did you mean v2-8"),
        (["qwen3-14b"], "Missing option '--topology'"),
        (["qwen3-14b", "--topology", "v2-8", "--mesh", "tensor=3"], "needs 3 devices, there are 8"),
        (["qwen3-14b", "--topology", "v2-8", "--mesh", "rows=8"], "unknown mesh axes ['rows']"),
        (["qwen3-14b", "--topology", "v2-8", "--mesh", "8"], "such as data=2,tensor=4"),
        (["qwen3-14b", "--topology", "v2-8", "--context", "40961"], "more than the 40960 of Qwen/Qwen3-14B"),
        (["qwen3-14b", "--topology", "v2-8", "--batch", "0"], "0 is not in the range"),
        (["qwen3-14b", "--topology", "h100", "--compile"], "does not know h100"),
        (["qwen3-14b", "--topology", "v2-8", "--png", "no-such-folder/a.png"], "there is no folder no-such-folder"),
    ],
)
def test_bad_input_ends_with_two(plan: Callable[..., Any], arguments: list[str], words: str) -> None:
    code, out, err = plan(*arguments)
    assert (code, out) == (2, "")
    assert words in err


def test_a_checkpoint_and_its_model_json_are_models_too(
    plan: Callable[..., Any], friendly_checkpoint: Path, tmp_path: Path
) -> None:
    by_folder, by_file = (
        json.loads(plan(path, "--topology", "cpu", "--json")[1])
        for path in (friendly_checkpoint, friendly_checkpoint / "model.json")
    )
    assert by_folder["per_device"] == by_file["per_device"]
    config = ModelConfig.from_json((friendly_checkpoint / "model.json").read_text())
    assert by_folder["context"] == config.context_length

    other = tmp_path / "config.json"
    other.write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    code, _, err = plan(other, "--topology", "cpu")
    assert code == 2
    assert "is not the model.json of a checkpoint" in err


def test_the_picture_is_a_png(plan: Callable[..., Any], tmp_path: Path) -> None:
    picture = tmp_path / "memory.png"
    assert plan("qwen3-14b", "--topology", "v2-8", "--png", picture)[0] == 0
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[at : at + 4]) for at in (16, 20))
    assert width > height > 300


def test_without_matplotlib_a_picture_is_refused_before_any_work(
    plan: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = plan("qwen3-14b", "--topology", "v2-8", "--png", tmp_path / "memory.png")
    assert (code, out) == (2, "")
    assert "pip install 'jllm-runtime[plot]'" in err


def program(arguments: int, aliases: int, temporaries: int) -> Program:
    collectives = (Collective("all-reduce", 1024, 3),)
    return Program(arguments, aliases, aliases, temporaries, 0, 1.0, 1.0, 0, collectives, 0.5)


def test_with_the_compiler_the_bytes_are_the_compilers(
    plan: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    growth = Program(200, 400, 0, 7, 3, 1.0, 0.0, 0, (), 0.1)
    programs = {"decode": program(1400, 400, 50), "prefill": program(1000, 400, 70), "growth": growth}
    answers = [Compilation(programs), Compilation({}, "decode: RESOURCE_EXHAUSTED: 9 GiB of 8")]
    monkeypatch.setattr("jllm_runtime.planner.plan.compile_programs", lambda *_: answers.pop(0))
    code, out, _ = plan("qwen3-0.6b", "--topology", "v2-8", "--compile", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["per_device"] | {"capacity_bytes": 0} == {
        "weights_bytes": 1000,
        "kv_bytes": 400,
        "temp_bytes": 210,  # the small cache, beside the large one that is the output, and ten more
        "total_bytes": 1610,
        "capacity_bytes": 0,
    }
    assert told["temp_bytes_by_program"] == {"decode": 50, "prefill": 70, "growth": 210}
    assert told["compiled"]["programs"]["decode"]["collectives"] == [{"kind": "all-reduce", "bytes": 1024, "count": 3}]

    code, out, _ = plan("qwen3-0.6b", "--topology", "v2-8", "--compile")
    assert code == 1
    assert "It does not fit: the compiler: decode: RESOURCE_EXHAUSTED: 9 GiB of 8." in " ".join(out.split())
