"""Command ``jllm plan``, called in this process."""

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jllm_core import ModelConfig
from jllm_core.checkpoint import Manifest
from jllm_core.errors import JLLMError
from jllm_core.quantization.arrays import GROUPS, Quantization
from jllm_runtime.cli import main
from jllm_runtime.planner import command
from jllm_runtime.planner.assumptions import QUANTIZATIONS, UNQUANTIZED
from jllm_runtime.planner.catalogue import PUBLISHED
from jllm_runtime.planner.model_configs import DESCRIPTIONS
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


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes these the packages that describe models, whatever is installed; nothing may be resolved (and converted)."""
    others = importlib.metadata.entry_points

    def put(*describers: Callable[[str], Any]) -> None:
        def entry_points(**query: Any) -> Any:
            assert query != {"group": "jllm.resolvers"}
            known = [SimpleNamespace(load=lambda each=each: each) for each in describers]
            return known if query == {"group": DESCRIPTIONS} else others(**query)

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)

    return put


def quantized_folder(folder: Path, dtype: str, quantization: Quantization | None) -> Path:
    """A checkpoint of a small model as far as a plan reads it: its config and its manifest."""
    folder.mkdir()
    (folder / "model.json").write_text(WIDE.to_json())
    Manifest(dtype=dtype, arrays={}, quantization=quantization).write(folder)
    return folder


WIDE = ModelConfig(
    model_type="llama",
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    context_length=1024,
)


def test_the_json_object_has_the_promised_fields(plan: Callable[..., Any]) -> None:
    code, out, _ = plan("qwen3-14b", "--topology", "v2-8", "--batch", 8, "--context", 4096, "--json")
    told = json.loads(out)
    assert (code, told["fits"], told["short_bytes"], told["alternatives"]) == (0, True, 0, [])
    parts = told["per_device"]
    assert set(parts) == {
        "weights_bytes",
        "kv_bytes",
        "states_bytes",
        "snapshots_bytes",
        "temp_bytes",
        "total_bytes",
        "capacity_bytes",
    }
    assert parts["total_bytes"] == parts["weights_bytes"] + parts["kv_bytes"] + parts["temp_bytes"]
    assert parts["total_bytes"] <= parts["capacity_bytes"] < 8 * 2**30
    assert {"decode_tokens_per_s", "bytes_per_step"} <= set(told["roofline"])
    assert told["largest_batch"] >= 8
    assert told["largest_context"] >= 4096
    assert (told["dtype"], told["quantize"], told["notes"]) == ("bfloat16", None, [])
    assert told["assumed"] == {
        "config": "the published config.json of Qwen/Qwen3-14B",
        "dtype": "bfloat16, assumed",
        "quantize": "not quantised, assumed",
        "types": "Weights, activations and cache in bfloat16, assumed.",
    }


def test_what_does_not_fit_ends_with_one_and_says_what_would(plan: Callable[..., Any]) -> None:
    code, out, _ = plan("Qwen/Qwen3-32B", "--topology", "v2-8", "--batch", 8)
    assert code == 1
    assert "It does not fit: 1." in out
    assert "GiB short on each device. These would:" in out
    assert "--quantize int8" in out
    machines = [line.split()[1:4] for line in out.splitlines() if "--topology" in line]
    assert ["v5e-8", "126", "GiB,"] in machines
    assert [int(size) for _, size, _ in machines] == sorted(int(size) for _, size, _ in machines)
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


def test_products_of_int8_are_planned_where_the_device_has_them(plan: Callable[..., Any]) -> None:
    asked = ("qwen3-14b", "--topology", "v5e-8", "--quantize", "int8", "--activations", "int8")
    code, out, _ = plan(*asked)
    assert (code, "weights int8, products of int8, bfloat16" in " ".join(out.split())) == (0, True)
    assert json.loads(plan(*asked, "--json")[1])["activations"] == "int8"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["qwen3-15b", "--topology", "v2-8"], "did you mean Qwen/Qwen3-14B"),
        (["qwen3-14b", "--topology", "v2-9"], "did you mean v2-8"),
        (["qwen3-14b"], "--topology is missing: the machine to plan for, such as v5e-1; `jllm plan --list` has all"),
        (["qwen3-14b", "--topology", "v2-8", "--mesh", "tensor=3"], "needs 3 devices, there are 8"),
        (["qwen3-14b", "--topology", "v2-8", "--mesh", "rows=8"], "unknown mesh axes ['rows']"),
        (["qwen3-14b", "--topology", "v2-8", "--mesh", "8"], "such as data=2,tensor=4"),
        (["qwen3-14b", "--topology", "v2-8", "--context", "40961"], "more than the 40960 of Qwen/Qwen3-14B"),
        (["qwen3-14b", "--topology", "v2-8", "--batch", "0"], "0 is not in the range"),
        (["qwen3-14b", "--topology", "cpu", "--compile"], "do not know cpu"),
        (["qwen3-14b", "--topology", "v5e-8", "--activations", "int8"], "these are not quantised"),
        (["qwen3-14b", "--topology", "h100", "--quantize", "int8", "--activations", "int8"], "this is NVIDIA H100"),
        (
            ["qwen3-14b", "--topology", "v2-8", "--group", "64"],
            "--group says how matrices are quantised: add --quantize",
        ),
        (["qwen3-14b", "--topology", "v2-8", "--quantize", "none", "--offsets"], "--offsets says how matrices are"),
        (["qwen3-14b", "--topology", "v2-8", "--quantize", "int8", "--offsets"], "offsets are for 4 bits"),
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
        json.loads(plan(path, "--topology", "cpu", "--json", *more)[1])
        for path, more in ((friendly_checkpoint, ()), (friendly_checkpoint / "model.json", ("--dtype", "float32")))
    )
    assert by_folder["per_device"] == by_file["per_device"]
    assert by_folder["assumed"]["dtype"] == "float32, as the checkpoint has it"
    assert by_file["assumed"]["dtype"] == "float32, as --dtype says"
    config = ModelConfig.from_json((friendly_checkpoint / "model.json").read_text())
    assert by_folder["context"] == config.context_length

    other = tmp_path / "config.json"
    other.write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    code, _, err = plan(other, "--topology", "cpu")
    assert code == 2
    assert "is not the model.json of a checkpoint" in err


@pytest.mark.parametrize(
    ("quantization", "words", "bytes_of_a_matrix"),
    [
        (None, "Weights, activations and cache in float32, as the checkpoint has it.", 4.0),
        (
            Quantization(4, 32),
            "Weight matrices in int4 in groups of 32, all else in float32, as the checkpoint has it.",
            0.5 + 2 / 32,
        ),
        (
            Quantization(4, 64, offsets=True, embedding=8),
            "Weight matrices in int4 in groups of 64 with offsets, the embedding in int8, all else in float32, as the "
            "checkpoint has it.",
            0.5 + 4 / 64,
        ),
        (
            Quantization(8),
            "Weight matrices in int8 with a scale a channel, all else in float32, as the checkpoint has it.",
            1.0,
        ),
    ],
    ids=["float32", "int4", "int4 with offsets", "int8"],
)
def test_a_checkpoint_is_planned_with_its_own_types(
    plan: Callable[..., Any], tmp_path: Path, quantization: Quantization | None, words: str, bytes_of_a_matrix: float
) -> None:
    folder = quantized_folder(tmp_path / "mine", "float32", quantization)
    told = json.loads(plan(folder, "--topology", "t4", "--json")[1])
    assert told["assumed"]["types"] == words
    assert (told["dtype"], told["quantize"]) == ("float32", quantization.name if quantization else None)
    d, f, v = WIDE.hidden_size, WIDE.intermediate_size, WIDE.vocab_size
    matrices = WIDE.num_layers * (4 * d * d + 3 * d * f) + d * v  # with an output head of its own
    embedding = d * v * (1 if quantization and quantization.embedding else 4)
    # Norms, and scales of whole channels, are a little more.
    assert told["per_device"]["weights_bytes"] == pytest.approx(matrices * bytes_of_a_matrix + embedding, rel=0.02)
    _, out, _ = plan(folder, "--topology", "t4")
    assert words in " ".join(out.split())


def test_what_the_command_says_wins_over_the_checkpoint(plan: Callable[..., Any], tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path / "mine", "float32", Quantization(4, 32))

    def told(*options: str) -> tuple[str, str | None, str]:
        found = json.loads(plan(folder, "--topology", "l4", "--json", *options)[1])
        return found["dtype"], found["quantize"], found["assumed"]["types"]

    assert told("--dtype", "bfloat16") == (
        *("bfloat16", "int4-g32"),
        "Weight matrices in int4 in groups of 32, as the checkpoint has it; all else in bfloat16, as --dtype says.",
    )
    assert told("--quantize", "int8") == (
        *("float32", "int8"),
        "Weight matrices in int8 with a scale a channel, as --quantize says; all else in float32, as the checkpoint "
        "has it.",
    )
    assert told("--quantize", "none")[:2] == ("float32", None)
    assert told("--kv-dtype", "int8")[2] == (
        "Weight matrices in int4 in groups of 32, as the checkpoint has it; keys and values in int8, as --kv-dtype "
        "says; all else in float32, as the checkpoint has it."
    )


@pytest.mark.parametrize("name", ["", "none/x.png", "/dev/full"])
def test_a_picture_that_cannot_be_written_is_one_sentence(
    name: str, plan: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = plan("qwen3-0.6b", "--topology", "cpu", "--png", name)
    assert (code, err.count("\n")) == (2, 1)
    assert "picture" in err


def test_more_gpus_than_a_machine_has_are_told_their_limit(plan: Callable[..., Any]) -> None:
    code, _, err = plan("qwen3-0.6b", "--topology", "17xh100")
    assert (code, "expected 1 to 16 GPUs of one machine, got 17" in err) == (2, True)


def test_keys_and_values_of_another_type_are_planned(plan: Callable[..., Any]) -> None:
    def told(*options: str) -> tuple[str, int]:
        found = json.loads(plan("qwen3-0.6b", "--topology", "v5e-1", "--json", *options)[1])
        return found["kv_dtype"], found["per_device"]["kv_bytes"]

    kept, slots = 2 * 28 * 8 * 4096, {"bfloat16": 2 * 128, "float32": 4 * 128, "int8": 128 + 4}
    assert told() == ("bfloat16", kept * slots["bfloat16"])
    for dtype in ("float32", "int8"):
        assert told("--kv-dtype", dtype) == (dtype, kept * slots[dtype])
    out = plan("qwen3-0.6b", "--topology", "v5e-1", "--kv-dtype", "int8")[1]
    assert "bfloat16, keys and values int8, batch 1" in out
    code, _, err = plan("qwen3-0.6b", "--topology", "v5e-1", "--kv-dtype", "int4")
    assert (code, "'int4' is not one of" in err) == (2, True)


def test_a_grid_of_ones_own_is_planned(plan: Callable[..., Any]) -> None:
    def weights(*options: str) -> int:
        asked = ("qwen3-0.6b", "--topology", "cpu", "--json", "--quantize", "int4", *options)
        return json.loads(plan(*asked)[1])["per_device"]["weights_bytes"]

    # The matrices of the layers: 28 of 2 * 1024 * (2048 + 1024) + 3 * 1024 * 3072 numbers, and the tied embedding.
    numbers, embedding, rows = 28 * (2 * 1024 * (2048 + 1024) + 3 * 1024 * 3072), 151936 * 1024, 151936
    groups = {size: 2 * numbers // size for size in (32, 64, 128)}  # a scale in bfloat16 for each
    assert weights() - weights("--group", "128") == groups[32] - groups[128]
    assert weights("--group", "64") - weights("--group", "128") == groups[64] - groups[128]
    assert weights("--offsets") - weights() == groups[32]
    assert weights("--embedding", "keep") == weights()
    assert 0 < embedding - (weights() - weights("--embedding", "int8")) <= 4 * rows
    out = " ".join(plan("qwen3-0.6b", "--topology", "cpu", "--quantize", "int8", "--group", "64")[1].split())
    assert "Weight matrices in int8 in groups of 64, as --quantize says" in out


def test_another_model_is_described_and_not_converted(
    plan: Callable[..., Any], install: Callable[..., None], tmp_path: Path
) -> None:
    asked = []

    def describe(model: str) -> Any:
        asked.append(model)
        return SimpleNamespace(config=WIDE, dtype="bfloat16", quantization=Quantization(8, 32), origin="as it says")

    install(lambda model: None, describe)
    told = json.loads(plan("somebody/wide", "--topology", "l4", "--json")[1])
    assert asked == ["somebody/wide"]
    assert (told["model"], told["dtype"], told["quantize"]) == ("somebody/wide", "bfloat16", "int8-g32")
    assert told["assumed"]["types"] == "Weight matrices in int8 in groups of 32, all else in bfloat16, as it says."

    # A path wins over a published model of the same name.
    (tmp_path / "Qwen3-8B").mkdir()
    told = json.loads(plan(tmp_path / "Qwen3-8B", "--topology", "l4", "--json")[1])
    assert told["quantize"] == "int8-g32"
    assert told["model"] == "Qwen3-8B"


def test_a_published_model_asks_nobody(plan: Callable[..., Any], install: Callable[..., None]) -> None:
    def describe(model: str) -> Any:
        raise AssertionError("asked")

    install(describe)
    assert plan("unsloth/Meta-Llama-3.1-8B-Instruct", "--topology", "h100")[0] == 0


def test_a_model_that_cannot_be_described_says_why_and_what_is_like_it(
    plan: Callable[..., Any], install: Callable[..., None], tmp_path: Path
) -> None:
    def describe(model: str) -> Any:
        raise JLLMError("the hub is away")

    install(describe)
    code, out, err = plan("Qwen/Qwen3-15B", "--topology", "t4")
    assert (code, out) == (2, "")
    assert "the hub is away. In the catalogue: did you mean Qwen/Qwen3-14B" in err
    assert "`jllm plan --list`" in err
    assert plan(tmp_path, "--topology", "t4")[2] == "Error: the hub is away\n"


def test_without_a_package_that_describes_models_the_one_to_install_is_named(
    plan: Callable[..., Any], install: Callable[..., None], tmp_path: Path
) -> None:
    install()
    for model in (tmp_path, "somebody/model"):
        code, out, err = plan(model, "--topology", "t4")
        assert (code, out) == (2, "")
        assert "unknown model" in err
        assert "pip install jllm-convert" in err


def test_the_list_has_every_model_and_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["jllm", "plan", "--list"])
    main()  # click ends it as it ends --help
    out = capsys.readouterr().out
    assert set(PUBLISHED) <= {line.strip() for line in out.splitlines()}
    assert "  2xt4       2 x Tesla T4" in out.splitlines()


def test_the_options_know_the_values_of_other_modules() -> None:
    assert (*QUANTIZATIONS, UNQUANTIZED) == command.QUANTIZE
    assert tuple(map(str, GROUPS)) == command.GROUPS


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
        "states_bytes": 0,
        "snapshots_bytes": 0,
        "temp_bytes": 210,  # the small cache, beside the large one that is the output, and ten more
        "total_bytes": 1610,
        "capacity_bytes": 0,
    }
    assert told["temp_bytes_by_program"] == {"decode": 50, "prefill": 70, "growth": 210}
    assert told["compiled"]["programs"]["decode"]["collectives"] == [{"kind": "all-reduce", "bytes": 1024, "count": 3}]

    code, out, _ = plan("qwen3-0.6b", "--topology", "v2-8", "--compile")
    assert code == 1
    assert "It does not fit: the compiler: decode: RESOURCE_EXHAUSTED: 9 GiB of 8." in " ".join(out.split())
