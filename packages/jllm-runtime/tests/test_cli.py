"""Command ``jllm``, called in this process. The model answers everything with "Hi, you!"."""

import builtins
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jllm_runtime import SamplingParams, cli_options
from jllm_runtime.cache.contiguous import KV_DTYPES
from jllm_runtime.cli import main
from jllm_runtime.speculative.prompt_lookup import DEFAULT_DRAFT

ANSWER = "Hi, you!"
SAMPLING = [
    "--max-tokens",
    "--temperature",
    "--top-k",
    "--top-p",
    "--min-p",
    "--seed",
    "--stop",
    "--lookup",
    "--kv-dtype",
]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def jllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs ``jllm`` with these arguments."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["jllm", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Outcome(code, out, err)

    return run


@pytest.fixture
def refused(jllm: Callable[..., Outcome]) -> Callable[..., str]:
    """Runs ``jllm`` with arguments that it must refuse, and gives its words."""

    def run(*arguments: object) -> str:
        outcome = jllm(*arguments)
        assert (outcome.code, outcome.out) == (2, "")
        return outcome.err

    return run


@pytest.fixture
def generate(jllm: Callable[..., Outcome], friendly_checkpoint: Path) -> Callable[..., Outcome]:
    """Runs ``jllm generate`` on the model that says "Hi, you!"."""
    return lambda *arguments: jllm("generate", friendly_checkpoint, "--no-compile-cache", *arguments)


# ---- Answers.


def test_generate_prints_the_answer(generate: Callable[..., Outcome]) -> None:
    outcome = generate("--prompt", "hello")
    assert (outcome.code, outcome.out) == (0, f"{ANSWER}\n")
    assert "stop]" in outcome.err  # the summary stays out of what a program might read


def test_generate_reads_a_file(generate: Callable[..., Outcome], tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("漢字\n", encoding="utf-8")
    outcome = generate("--prompt-file", file, "--json", "--raw")
    assert json.loads(outcome.out)["prompt_token_ids"] == list("漢字\n".encode())


def test_the_json_object_says_it_all(generate: Callable[..., Outcome], tiny) -> None:
    outcome = generate("--prompt", "hello", "--json")
    assert outcome.out.count("\n") == 1
    result = json.loads(outcome.out)
    assert list(result) == ["text", "token_ids", "prompt_token_ids", "finish_reason", "timings"]
    assert (result["text"], result["finish_reason"]) == (ANSWER, "stop")
    assert result["token_ids"] == [*ANSWER.encode(), tiny.im_end]
    assert result["prompt_token_ids"] == tiny.tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    assert list(result["timings"]) == [
        "load_s",
        "compile_s",
        "prefill_s",
        "decode_s",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
    ]
    assert all(isinstance(value, float) and value > 0 for value in result["timings"].values())


def test_raw_leaves_the_chat_template_out(generate: Callable[..., Outcome]) -> None:
    result = json.loads(generate("--prompt", "H", "--raw", "--json").out)
    assert (result["text"], result["prompt_token_ids"]) == ("i, you!", [ord("H")])


def test_a_system_message_comes_first(generate: Callable[..., Outcome], tiny) -> None:
    result = json.loads(generate("--prompt", "hello", "--system", "be brief", "--json").out)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert result["prompt_token_ids"] == tiny.tokenizer.encode_chat(messages)


def test_letters_beyond_ascii_are_printed_as_they_are(jllm, write_checkpoint) -> None:
    model = write_checkpoint.saying(">漢")
    outcome = jllm("generate", model, "--no-compile-cache", "--raw", "--prompt", ">", "--json", "--max-tokens", 3)
    assert '"text": "漢"' in outcome.out


def test_the_options_are_the_sampling_parameters(
    generate: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def record(_: object, __: object, params: SamplingParams, **___: object) -> list[Any]:
        asked.append(params)
        return []

    monkeypatch.setattr("jllm_runtime.generation.stream_generate", record)
    generate("--prompt", "x")
    options = "--temperature 0.5 --top-k 4 --top-p 0.75 --min-p 0.125 --seed 6 --max-tokens 7 --stop a --stop b"
    generate("--prompt", "x", *options.split())
    assert asked == [
        SamplingParams(),
        SamplingParams(temperature=0.5, top_k=4, top_p=0.75, min_p=0.125, seed=6, max_tokens=7, stop=["a", "b"]),
    ]


def test_the_options_know_the_values_of_other_modules() -> None:
    assert cli_options.KV_DTYPES == KV_DTYPES
    assert cli_options.DEFAULT_DRAFT == DEFAULT_DRAFT


@pytest.mark.parametrize(
    ("arguments", "expected"), [([], 0), (["--lookup"], DEFAULT_DRAFT), (["--lookup", "3"], 3), (["--lookup", "0"], 0)]
)
@pytest.mark.parametrize("as_json", [False, True])
def test_lookup_is_off_unless_asked_for(
    arguments: list[str],
    expected: int,
    as_json: bool,
    generate: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    for name in ("generate", "stream_generate"):
        monkeypatch.setattr(f"jllm_runtime.generation.{name}", lambda *_, **how: asked.append(how) or exit(0))
    generate("--prompt", "x", *(["--json"] if as_json else []), *arguments)
    assert asked == [{"lookup": expected, "kv_dtype": None}]


def test_chat_looks_up_too(jllm, friendly_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, asked = iter(["hello", "/exit"]), []
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    monkeypatch.setattr("jllm_runtime.chat.local.stream_generate", lambda *_, **how: asked.append(how) or iter([]))
    jllm("chat", friendly_checkpoint, "--no-compile-cache", "--lookup", "5", "--kv-dtype", "int8")
    assert asked == [{"lookup": 5, "kv_dtype": "int8"}]


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_an_unknown_kv_dtype_is_refused(command: str, jllm, friendly_checkpoint: Path) -> None:
    outcome = jllm(command, friendly_checkpoint, "--kv-dtype", "int4")
    assert outcome.code == 2
    assert "'int4' is not one of 'float32', 'bfloat16', 'int8'" in outcome.err


def test_the_type_is_the_one_asked_for(generate: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr("jllm_runtime.generation.stream_generate", lambda model, *_, **__: loaded.append(model) or [])
    generate("--prompt", "x", "--dtype", "bfloat16")
    assert loaded[0].weights.embedding.dtype == "bfloat16"


def test_chat_talks(jllm, friendly_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["hello", "/exit"])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    outcome = jllm("chat", friendly_checkpoint, "--no-compile-cache")
    assert (outcome.code, outcome.out) == (0, f"{ANSWER}\n")


@pytest.mark.parametrize("keep", [True, False])
def test_compiled_programs_are_kept_unless_told_otherwise(
    keep: bool, jllm, friendly_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr("jllm_runtime.loading.use_compile_cache", lambda: calls.append(1))
    monkeypatch.setattr("jllm_runtime.generation.stream_generate", lambda *_, **__: [])
    jllm("generate", friendly_checkpoint, "--prompt", "x", *([] if keep else ["--no-compile-cache"]))
    assert len(calls) == keep


# ---- Help.


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--help"], ["generate", "chat", "MODEL"]),
        (["-h"], ["generate", "chat"]),
        (["generate", "--help"], ["--prompt", "--prompt-file", "--system", "--raw", "--json", "--dtype"]),
        (
            ["generate", "--help"],
            SAMPLING,
        ),
        (["chat", "--help"], ["--system", *SAMPLING]),
    ],
)
def test_help_lists_what_there_is(arguments: list[str], parts: list[str], jllm) -> None:
    outcome = jllm(*arguments)
    assert outcome.code == 0
    for part in parts:
        assert part in outcome.out


def test_the_version(jllm) -> None:
    from jllm_runtime import __version__

    assert jllm("--version").out == f"jllm, version {__version__}\n"


# ---- Refusals: code 2, a message, no traceback.


def test_a_prompt_is_needed(refused, friendly_checkpoint: Path) -> None:
    assert "--prompt TEXT or with --prompt-file FILE" in refused("generate", friendly_checkpoint)


def test_only_one_prompt_is_taken(refused, friendly_checkpoint: Path) -> None:
    assert "one of the two" in refused("generate", friendly_checkpoint, "--prompt", "x", "--prompt-file", "y")


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["chat"]])
def test_a_model_that_is_not_there(command: list[str], refused, tmp_path: Path) -> None:
    assert "there is no model at" in refused(*command, "--no-compile-cache", tmp_path / "missing")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", "-1", "temperature must be 0 or above, got -1.0"),
        ("--temperature", "nan", "temperature must be 0 or above, got nan"),
        ("--temperature", "warm", "--temperature"),
        ("--top-k", "-1", "top_k must be"),
        ("--top-p", "0", "top_p must be above 0"),
        ("--min-p", "2", "min_p must be"),
        ("--seed", "-1", "seed must be"),
        ("--max-tokens", "0", "max_tokens must be"),
        ("--stop", "", "stop must be"),
        ("--dtype", "float16", "--dtype"),
        ("--no-such-option", "1", "--no-such-option"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["chat"]], ids=lambda command: command[0])
def test_a_bad_option_is_refused_before_the_model_is_looked_for(
    command: list[str], option: str, value: str, message: str, refused
) -> None:
    assert message in refused(*command, "missing", option, value)


def test_an_empty_prompt(refused) -> None:
    assert "the prompt is empty" in refused("generate", "missing", "--prompt", "")


def test_an_empty_prompt_file(refused, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    message = refused("generate", "missing", "--prompt-file", tmp_path / "empty.txt")
    assert "empty.txt is empty" in message


def test_a_prompt_file_that_is_not_there(refused, tmp_path: Path) -> None:
    assert "cannot be read" in refused("generate", "missing", "--prompt-file", tmp_path / "missing.txt")


def test_a_prompt_file_that_is_no_text(refused, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused("generate", "missing", "--prompt-file", tmp_path / "image")


def test_a_system_message_has_no_place_in_a_raw_prompt(refused) -> None:
    assert "--system" in refused("generate", "missing", "--prompt", "x", "--raw", "--system", "y")


def test_a_prompt_longer_than_the_context(refused, friendly_checkpoint: Path) -> None:
    message = refused("generate", friendly_checkpoint, "--no-compile-cache", "--prompt", "long " * 100)
    assert "the context of the model is 300" in message


def test_a_model_that_is_not_for_chats(refused, jllm, write_checkpoint) -> None:
    model = write_checkpoint.saying(">hey", chat_template=None)
    assert "--raw" in refused("generate", model, "--no-compile-cache", "--prompt", ">")
    assert "--raw" in refused("chat", model, "--no-compile-cache")
    outcome = jllm("generate", model, "--no-compile-cache", "--prompt", ">", "--raw", "--max-tokens", 3)
    assert (outcome.code, outcome.out) == (0, "hey\n")


def test_a_model_without_a_tokenizer(refused, write_checkpoint) -> None:
    model = write_checkpoint.saying(">hey", tokenizer=False)
    for raw in ([], ["--raw"]):
        assert "no tokenizer" in refused("generate", model, "--no-compile-cache", "--prompt", ">", *raw)
    refused("chat", model, "--no-compile-cache")


def test_an_unknown_command(refused) -> None:
    assert "No such command 'train'" in refused("train")


# ---- Ctrl-C, and a reader that goes away.


def test_ctrl_c_ends_with_130(generate: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jllm_runtime.loading.load_model", interrupt)
    outcome = generate("--prompt", "x")
    assert (outcome.code, outcome.out) == (130, "")
    assert "Stopped" in outcome.err
