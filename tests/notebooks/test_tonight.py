"""The notebooks for accelerators: one text with several settings, which plans and commands take as they are."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from jllm_convert.cli import cli as convert_cli
from jllm_runtime.cli import cli as runtime_cli
from nbformat import NotebookNode

from website import notebooks

TONIGHT = [source for source in notebooks.sources() if source.parent.name == "tonight"]
CHOICES = [
    ("colab_v5e1", {}),
    ("colab_v5e1", {'MODEL = "Qwen/Qwen3-4B"': 'MODEL = "Qwen/Qwen3.5-4B"'}),
    ("colab_t4", {}),
    ("colab_cpu", {}),
    ("kaggle", {}),
    ("kaggle", {'MACHINE = "TPU v5e-8"': 'MACHINE = "GPU T4 x2"'}),
]


def cells(source: Path, tag: str) -> list[NotebookNode]:
    return [cell for cell in notebooks.read(source).cells if tag in notebooks.tags(cell)]


def without_rates(text: str) -> str:
    return re.sub(r"(CPU_S_PER_GB = )\d+", r"\1N", text)


def settings(name: str, changes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the first cell sets on the machine that the notebook is for."""
    monkeypatch.delenv("JLLM_TRY_HERE", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")
    source = next(each for each in TONIGHT if each.stem == name)
    (cell,) = cells(source, "settings")
    text = cell.source
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    found: dict[str, Any] = {}
    exec(text, found)
    return found


def planned(*arguments: str) -> dict[str, Any]:
    answer = CliRunner().invoke(runtime_cli, ["plan", *arguments, "--json"])
    assert answer.exit_code == 0, answer.output
    plan: dict[str, Any] = json.loads(answer.stdout)
    return plan


def test_there_is_one_for_each_machine() -> None:
    assert {source.stem for source in TONIGHT} == {name for name, _ in CHOICES}


def test_they_differ_in_their_settings_alone() -> None:
    shared = [[without_rates(cell.source) for cell in cells(source, "shared")] for source in TONIGHT]
    assert len(shared[0]) == 9
    assert all(each == shared[0] for each in shared)


@pytest.mark.parametrize("source", TONIGHT, ids=lambda source: source.stem)
def test_the_small_model_answers_and_is_served(source: Path) -> None:
    outputs = [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebooks.executed(source).cells
        if "shared" in notebooks.tags(cell)
    ]
    assert "decoding, at best:" in outputs[1]
    assert "disk at its fullest" in outputs[3]
    assert "SmolLM2" in outputs[4]
    assert "Paris" in outputs[5]
    assert "the server is ready" in outputs[6]
    assert "tokens/s" in outputs[7]
    assert outputs[8] == "stopped: 0\n"


@pytest.mark.parametrize(("name", "changes"), CHOICES, ids=str)
def test_the_plan_fits_and_the_conversion_takes_the_options(
    name: str, changes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(name, changes, monkeypatch)
    assert chosen["STREAM"] == ["--stream-from-hub"]
    plan = planned(chosen["MODEL"], "--topology", chosen["TOPOLOGY"], *chosen["PLAN"])
    assert plan["fits"]
    assert plan["model"] == chosen["MODEL"]
    options = [*chosen["CONVERT"], *chosen["STREAM"], "--exist-ok"]
    convert_cli.commands["convert"].make_context("convert", [chosen["MODEL"], "model", *options])
    # The plan is of what is converted.
    for option in ("--dtype", "--quantize"):
        if option in chosen["CONVERT"]:
            assert option in chosen["PLAN"]
    # What is said of the checkpoint, against the bytes that a plan for one device counts.
    if chosen["TOPOLOGY"] in ("v5e-1", "t4"):
        nbytes = chosen["BYTES_A_WEIGHT"] * plan["parameters"]
        assert plan["per_device"]["weights_bytes"] == pytest.approx(nbytes, rel=0.05)


def test_the_figures_in_their_text_are_those_of_the_plan() -> None:
    for options, tokens in ((["--quantize", "int8"], 64), ([], 37)):
        plan = planned("Qwen/Qwen3-4B", "--topology", "t4", "--dtype", "float16", *options, "--context", "4096")
        assert round(plan["roofline"]["decode_tokens_per_s"]) == tokens
    each = planned("Qwen/Qwen3-14B", "--topology", "v5e-8", "--context", "4096")["per_device"]["weights_bytes"]
    assert each / 2**30 == pytest.approx(3.4, abs=0.05)
