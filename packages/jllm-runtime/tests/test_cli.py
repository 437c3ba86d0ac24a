"""Command ``jllm``, called in this process. The model answers everything with "Hi, you!"."""

import builtins
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from jllm_runtime import SamplingParams, answer_length, cli_options
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


@pytest.mark.parametrize("options", [[], ["--prompt", "-"], ["--prompt-file", "-"]])
def test_generate_reads_standard_input(
    options: list[str], generate: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("é\n\n".encode()), encoding="ascii"))
    outcome = generate(*options, "--json", "--raw")
    # The last line break is what echo adds.
    assert json.loads(outcome.out)["prompt_token_ids"] == list("é\n".encode())


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"\n", "is empty"), (b"\xff", "can't decode byte 0xff")]
)
def test_standard_input_without_a_prompt(
    content: bytes, message: str, refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    said = refused("generate", "missing")
    assert "the prompt from standard input" in said
    assert message in said


def test_the_json_object_says_it_all(generate: Callable[..., Outcome], tiny) -> None:
    outcome = generate("--prompt", "hello", "--json")
    assert outcome.out.count("\n") == 1
    result = json.loads(outcome.out)
    assert list(result) == [
        *("text", "token_ids", "prompt_token_ids", "finish_reason", "timings"),
        *("reasoning", "sampling", "backend"),
    ]
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


@pytest.mark.parametrize(("prefill", "answer"), [("Hi, ", "you!"), ("H", "i, you!"), ("\n", ANSWER)])
def test_the_answer_goes_on_from_a_prefill(prefill: str, answer: str, generate: Callable[..., Outcome], tiny) -> None:
    result = json.loads(generate("--prompt", "hello", "--prefill", prefill, "--json").out)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": prefill}]
    prompt = tiny.tokenizer.encode_chat(messages, continue_final_message=True)
    assert (result["text"], result["prompt_token_ids"]) == (answer, prompt)
    assert tiny.tokenizer.decode(prompt).endswith(f"assistant\n{prefill}")
    assert generate("--prompt", "hello", "--prefill", prefill).out == f"{answer}\n"


@pytest.mark.parametrize(("prefill", "thought"), [("<think>W", "Hm?"), ("<think>x</think>W", None), ("W", None)])
def test_a_prefill_may_begin_with_thoughts(prefill: str, thought: str | None, jllm, write_checkpoint, tiny) -> None:
    template = tiny.tokenizer.chat_template + "{# </think> #}"
    said = [*b"WHm?</think>Yes!", tiny.im_end]
    model = write_checkpoint.saying(said, generation_config={"eos_token_id": tiny.im_end}, chat_template=template)
    command = ("generate", model, "--no-compile-cache", "--prompt", "x", "--prefill", prefill, "--json")
    result = json.loads(jllm(*command).out)
    assert (result["text"], result["reasoning"]) == ("Hm?</think>Yes!", thought)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prefill", ""], "--prefill is empty"),
        (["--prefill", "x", "--raw"], "--prefill is part of a conversation, and --raw means there is none"),
        (["--prefill", "\udcff"], "the prefill"),
    ],
)
def test_a_prefill_that_cannot_be_is_told_at_once(options: list[str], message: str, refused) -> None:
    assert message in refused("generate", "missing", "--prompt", "x", *options)


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
    monkeypatch.setattr("jllm_runtime.sampling.draw_seed", lambda: 9)
    generate("--prompt", "x")
    options = "--temperature 0.5 --top-k 4 --top-p 0.75 --min-p 0.125 --seed 6 --max-tokens 7 --stop a --stop b"
    generate("--prompt", "x", *options.split())
    assert asked == [
        SamplingParams(seed=9, max_tokens=2048),
        SamplingParams(temperature=0.5, top_k=4, top_p=0.75, min_p=0.125, seed=6, max_tokens=7, stop=["a", "b"]),
    ]


def test_the_options_know_the_values_of_other_modules() -> None:
    assert cli_options.KV_DTYPES == KV_DTYPES
    assert cli_options.DEFAULT_DRAFT == DEFAULT_DRAFT
    assert cli_options.DEFAULT_MAX_TOKENS == answer_length.DEFAULT_MAX_TOKENS
    assert cli_options.DEFAULT_MAX_TOKENS_THINKING == answer_length.DEFAULT_MAX_TOKENS_THINKING


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


@pytest.mark.parametrize(
    "arguments", [["--lookup", "MODEL"], ["--lookup", "MODEL", "--seed", "1"], ["--lookup=3", "MODEL"]]
)
def test_lookup_does_not_take_the_model_for_its_number(
    arguments: list[str], jllm, friendly_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("jllm_runtime.generation.stream_generate", lambda *_, **how: asked.append(how["lookup"]) or [])
    given = [str(friendly_checkpoint) if argument == "MODEL" else argument for argument in arguments]
    assert jllm("generate", "--no-compile-cache", "--prompt", "x", *given).code == 0
    assert asked == [3 if "=" in arguments[0] else DEFAULT_DRAFT]


@pytest.mark.parametrize("value", ["3.5", "many"])
def test_a_number_for_lookup_that_is_none(value: str, refused) -> None:
    assert f"'{value}' is not a valid integer" in refused("generate", "missing", "--prompt", "x", "--lookup", value)


# ---- Sampling, as the publisher recommends it.


@pytest.fixture
def drawn_checkpoint(write_checkpoint) -> Path:
    """A checkpoint whose publisher recommends to draw."""
    settings = {"do_sample": True, "temperature": 0.75, "top_k": 20, "repetition_penalty": 1.05}
    return write_checkpoint(generation_config=settings)


def test_the_publisher_s_parameters_are_taken_and_told(jllm, drawn_checkpoint: Path) -> None:
    command = ("generate", drawn_checkpoint, "--no-compile-cache", "--prompt", "x", "--max-tokens", 20)
    outcome = jllm(*command)
    words = "temperature 0.75, top-k 20, repetition penalty 1.05 (the publisher's)"
    seed = re.search(rf"\[{re.escape(words)}, seed (\d+); ", outcome.err)
    assert seed, outcome.err
    result = json.loads(jllm(*command, "--json", "--seed", seed[1]).out)
    assert f"{result['text']}\n" == outcome.out
    published = {"temperature": 0.75, "top_k": 20, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.05}
    rest = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": int(seed[1]), "max_tokens": 20, "stop": []}
    assert result["sampling"] == published | rest
    # A seed that was drawn is told in JSON too, and gives the same text again.
    first = json.loads(jllm(*command, "--json").out)
    again = json.loads(jllm(*command, "--json", "--seed", first["sampling"]["seed"]).out)
    assert again["token_ids"] == first["token_ids"]


def test_greedy_is_asked_for_by_name(jllm, refused, drawn_checkpoint: Path) -> None:
    command = ("generate", drawn_checkpoint, "--no-compile-cache", "--prompt", "x", "--max-tokens", 5)
    outcome = jllm(*command, "--greedy", "--repetition-penalty", 1)
    assert "[greedy; " in outcome.err
    assert jllm(*command, "--temperature", 0, "--repetition-penalty", 1).out == outcome.out
    assert "give one of the two" in refused(*command, "--greedy", "--temperature", "0.5")


def test_an_impossible_value_of_the_publisher_s(refused, jllm, write_checkpoint) -> None:
    model = write_checkpoint.saying(">hey", generation_config={"temperature": "warm"})
    command = ("generate", model, "--no-compile-cache", "--raw", "--prompt", ">", "--max-tokens", 3)
    message = refused(*command)
    assert str(model / "generation_config.json") in message
    assert "temperature must be 0 or above, got 'warm'" in message
    assert jllm(*command, "--greedy").out == "hey\n"


# ---- Thinking, and other variables of the template.


@pytest.fixture
def thinking_checkpoint(write_checkpoint, tiny) -> Path:
    """A checkpoint that may think, and says anything."""
    turned_off = "{% if not enable_thinking | default(true) %}<think></think>{% endif %}{{ tone }}"
    return write_checkpoint(chat_template=tiny.tokenizer.chat_template + turned_off)


def test_thinking_is_turned_off_and_on(jllm, thinking_checkpoint: Path, tiny) -> None:
    prompts = {}
    for option in ("--think", "--no-think", "--template-var=enable_thinking=false", "--template-var=tone=kind"):
        command = ("generate", thinking_checkpoint, "--no-compile-cache", "--prompt", "x", "--max-tokens", 1, "--json")
        prompts[option] = tiny.tokenizer.decode(json.loads(jllm(*command, option).out)["prompt_token_ids"])
    assert not prompts["--think"].endswith("<think></think>")
    assert prompts["--no-think"].endswith("<think></think>")
    assert prompts["--no-think"] == prompts["--template-var=enable_thinking=false"]
    assert prompts["--template-var=tone=kind"] == prompts["--think"] + "kind"


def test_a_model_that_thinks_may_say_more(jllm, thinking_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "jllm_runtime.generation.stream_generate", lambda _, __, p, **___: asked.append(p.max_tokens) or []
    )
    for options in ([], ["--no-think"], ["--max-tokens", "7"], ["--raw"]):
        jllm("generate", thinking_checkpoint, "--no-compile-cache", "--prompt", "x", *options)
    assert asked == [16384, 2048, 7, 2048]


@pytest.fixture
def thinker_checkpoint(write_checkpoint, tiny) -> Path:
    """A checkpoint whose prompt opens the thinking, and that goes on: ``Hm?</think>Yes!``."""
    template = tiny.tokenizer.chat_template.replace("assistant\n", "assistant\n<think>\n") + "{# </think> #}"
    said = [*b"\nHm?</think>Yes!", tiny.im_end]
    return write_checkpoint.saying(said, generation_config={"eos_token_id": tiny.im_end}, chat_template=template)


@pytest.mark.parametrize("on_terminal", [True, False])
def test_thinking_is_shown_fainter_on_a_terminal(
    on_terminal: bool, jllm, thinker_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: on_terminal, raising=False)
    outcome = jllm("generate", thinker_checkpoint, "--no-compile-cache", "--prompt", "x")
    assert click.unstyle(outcome.out) == ("Hm?\n\nYes!\n" if on_terminal else "Hm?</think>Yes!\n")
    assert outcome.out.startswith("\x1b[2mH\x1b[0m") == on_terminal


def test_the_json_object_has_the_thinking_alone_too(jllm, thinker_checkpoint: Path) -> None:
    result = json.loads(jllm("generate", thinker_checkpoint, "--no-compile-cache", "--prompt", "x", "--json").out)
    assert (result["text"], result["reasoning"]) == ("Hm?</think>Yes!", "Hm?")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--think"], "no variable 'enable_thinking'; it has none"),
        (["--template-var", "tone=kind"], "no variable 'tone'; it has none"),
        (["--template-var", "tone"], "expected NAME=VALUE"),
        (["--template-var", "=1"], "expected NAME=VALUE"),
        (["--think", "--template-var", "enable_thinking=false"], "contradict each other"),
        (["--raw", "--no-think"], "--raw means there is none"),
    ],
)
def test_variables_that_have_no_effect_are_refused(
    options: list[str], message: str, refused, friendly_checkpoint
) -> None:
    assert message in refused("generate", friendly_checkpoint, "--no-compile-cache", "--prompt", "x", *options)


def test_chat_looks_up_too(jllm, friendly_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, asked = iter(["hello", "/exit"]), []
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    monkeypatch.setattr("jllm_runtime.chat.local.stream_generate", lambda *_, **how: asked.append(how) or iter([]))
    jllm("chat", friendly_checkpoint, "--no-compile-cache", "--lookup", "5", "--kv-dtype", "int8")
    assert asked == [{"lookup": 5, "kv_dtype": "int8"}]


def test_compiling_ahead_is_of_no_use_without_a_cache(jllm, friendly_checkpoint: Path) -> None:
    outcome = jllm("compile", friendly_checkpoint)  # the tests keep no programs
    assert outcome.code == 2
    assert "compiled programs are not kept here" in outcome.err


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_an_unknown_kv_dtype_is_refused(command: str, jllm, friendly_checkpoint: Path) -> None:
    outcome = jllm(command, friendly_checkpoint, "--kv-dtype", "int4")
    assert outcome.code == 2
    assert "'int4' is not one of 'float32', 'bfloat16', 'float16', 'int8'" in outcome.err


def test_the_type_is_the_one_asked_for(generate: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr("jllm_runtime.generation.stream_generate", lambda model, *_, **__: loaded.append(model) or [])
    for dtype in ("bfloat16", "float16"):
        generate("--prompt", "x", "--dtype", dtype)
        assert loaded[-1].weights.embedding.dtype == dtype


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
        (["generate", "--help"], ["--prompt", "--prompt-file", "--system", "--prefill", "--raw", "--json", "--dtype"]),
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


@pytest.mark.parametrize("command", ["bench", "chat", "compile", "eval", "generate", "serve"])
def test_help_of_a_command_says_what_a_model_is(command: str, jllm) -> None:
    words = " ".join(jllm(command, "--help").out.split())
    assert "MODEL is a folder that `jllm-convert convert` made or, with jllm-convert installed, a Hugging Face" in words


def test_the_version(jllm) -> None:
    from jllm_runtime import __version__

    assert jllm("--version").out == f"jllm, version {__version__}\n"


# ---- Refusals: code 2, a message, no traceback.


def test_a_prompt_is_needed(refused, friendly_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
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
        ("--top-p", "1.5", "top_p must be from 0 to 1"),
        ("--min-p", "2", "min_p must be"),
        ("--seed", "-1", "seed must be"),
        ("--max-tokens", "0", "max_tokens must be"),
        ("--stop", "", "stop must be"),
        ("--dtype", "float8", "--dtype"),
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
    path = tmp_path / "missing.txt"
    message = refused("generate", "missing", "--prompt-file", path)
    assert f"the prompt file {path} cannot be read: No such file or directory" in message


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


@pytest.mark.parametrize(
    ("command", "words"), [("generate", "goes with --prompt TEXT"), ("chat", "typed once it runs")]
)
@pytest.mark.parametrize("prompt", [["Why?"], ["Why", "is", "it?"]])
def test_a_prompt_behind_the_model_is_told_where_it_belongs(
    command: str, words: str, prompt: list[str], refused
) -> None:
    message = refused(command, "missing", *prompt)
    assert f"({' '.join(prompt)})" in message
    assert words in message
    # Other slips get no such advice.
    assert words not in refused(command, "missing", "--nope")


@pytest.mark.parametrize("command", [["generate", "", "--prompt", "x"], ["plan", "", "--topology", "cpu"]])
def test_an_empty_name_is_no_current_folder(command: list[str], refused) -> None:
    assert "the model's name is empty" in refused(*command)


def test_what_is_missing_of_the_options_of_processes_is_named(refused) -> None:
    message = refused("generate", "missing", "--prompt", "x", "--process-id", "3")
    assert "--coordinator and --num-processes are missing" in message


def test_an_unknown_command(refused) -> None:
    assert "No such command 'train'" in refused("train")


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["plam"], "plan"),
        (["generate", "m", "--temprature", "1"], "--temperature"),
        (["chat", "--look-up"], "--lookup"),
    ],
)
def test_a_slip_is_told_what_was_meant(arguments: list[str], meant: str, refused) -> None:
    message = refused(*arguments)
    assert "Did you mean" in message
    assert meant in message


@pytest.mark.parametrize(
    ("command", "meant"),
    [("run", "`jllm generate` or `jllm chat`"), ("convert", "`jllm-convert convert`")],
)
def test_commands_of_other_programs_lead_to_ours(command: str, meant: str, refused) -> None:
    assert f"No such command '{command}'. Use {meant}." in refused(command, "x")


@pytest.mark.parametrize(
    ("name", "offered"),
    [("qwen3-0.6b", "Qwen/Qwen3-0.6B on the hub?"), ("Qwen3-8", "Qwen/Qwen3-8B"), ("./Qwen3-0.6B", "Qwen/Qwen3-0.6B")],
)
def test_names_on_the_hub_are_offered(name: str, offered: str, refused) -> None:
    assert offered in refused("generate", name, "--no-compile-cache", "--prompt", "x")


def test_a_path_is_offered_nothing(refused, tmp_path: Path) -> None:
    message = refused("generate", tmp_path / "missing", "--no-compile-cache", "--prompt", "x")
    assert "no such file or folder" in message
    assert "on the hub?" not in message


@pytest.mark.parametrize(
    ("option", "name"), [("--prompt", "the prompt"), ("--system", "the system message"), ("--stop", "stop")]
)
def test_a_text_that_is_no_unicode(option: str, name: str, refused) -> None:
    prompt = [] if option == "--prompt" else ["--prompt", "x"]
    message = refused("generate", "missing", *prompt, option, "caf\udce9 au lait")
    assert f"{name} is not valid text: character 4 is the byte 0xE9, in 'caf\\udce9 au lait'" in message
    assert "LC_ALL=C.UTF-8" in message


def test_the_help_has_whole_sentences_and_the_exit_codes(jllm) -> None:
    shown = " ".join(jllm("--help").out.partition("Commands:")[2].split())
    assert "..." not in shown
    for sentence in ("Answer one prompt.", "Chat with a model.", "beside what its device can do."):
        assert sentence in shown
    assert "Exit codes: 0 done; 1 a plan that does not fit" in shown


# ---- Ctrl-C, and a reader that goes away.


def test_ctrl_c_ends_with_130(generate: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jllm_runtime.loading.load_model", interrupt)
    outcome = generate("--prompt", "x")
    assert (outcome.code, outcome.out) == (130, "")
    assert "Stopped" in outcome.err
