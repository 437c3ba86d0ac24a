"""Chat session in the terminal. The model answers everything with "Hi, you!"."""

import builtins
import json
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jllm_runtime import Model, Piece, RequestError, SamplingParams, generate, load_model
from jllm_runtime.chat.conversation import DEFAULT, Thinking
from jllm_runtime.chat.line_input import history_path, is_open, open_history, unquoted
from jllm_runtime.chat.local import ChatSession
from jllm_runtime.chat.terminal import run_chat
from jllm_runtime.chat.transcript import load_messages, save_messages
from jllm_runtime.chat.word_wrap import WordWrap
from jllm_runtime.outputs import OutputStream, Timings
from jllm_runtime.tokenizer import ChatPrompt

ANSWER = "Hi, you!"
OPEN, CLOSE = "<think>", "</think>"


@pytest.fixture(scope="module")
def model(friendly_checkpoint) -> Model:
    return load_model(friendly_checkpoint)


@pytest.fixture
def session(model: Model) -> Iterator[ChatSession]:
    session = ChatSession(model, SamplingParams())
    yield session
    session.close()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def interrupted_after(*texts: str) -> Callable[..., Iterator[Piece]]:
    """Pieces of an answer that somebody stops with Ctrl-C."""

    def pieces(*_: Any) -> Iterator[Piece]:
        yield from (Piece(text, []) for text in texts)
        raise KeyboardInterrupt

    return pieces


# ---- The conversation.


def test_question_and_answer_are_remembered(session: ChatSession) -> None:
    assert "".join(session.send("one")) == ANSWER
    assert "".join(session.send("two")) == ANSWER
    assert session.messages == [user("one"), assistant(ANSWER), user("two"), assistant(ANSWER)]


def test_the_model_is_given_the_whole_conversation(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def record(_: ChatSession, prompt: list[int], params: SamplingParams) -> Iterator[Piece]:
        given.append((model.tokenizer.decode(prompt, skip_special_tokens=False), params))
        yield Piece("yes", [])

    monkeypatch.setattr(ChatSession, "_pieces", record)
    params = SamplingParams(max_tokens=3, seed=5)
    session = ChatSession(model, params, system="be brief")
    for text in ("one", "two"):
        assert list(session.send(text)) == ["yes"]
    opening = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    assert given == [
        (opening, params),
        (opening + "yes<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n", params),
    ]


def test_a_reset_leaves_the_system_message(model: Model) -> None:
    session = ChatSession(model, SamplingParams(), system="be brief")
    list(session.send("one"))
    assert len(session.messages) == 3
    session.reset()
    assert session.messages == [system("be brief")]


def test_a_reset_without_a_system_message_leaves_nothing(session: ChatSession) -> None:
    list(session.send("one"))
    session.reset()
    assert session.messages == []


def test_a_closed_answer_stays_as_far_as_it_came(session: ChatSession) -> None:
    pieces = session.send("one")
    assert next(pieces) == "H"
    pieces.close()
    assert session.messages == [user("one"), assistant("H")]


def test_an_interrupted_answer_stays_as_far_as_it_came(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChatSession, "_pieces", interrupted_after("Hi", ", y"))
    with pytest.raises(KeyboardInterrupt):
        list(session.send("one"))
    assert session.messages == [user("one"), assistant("Hi, y")]


def test_a_conversation_longer_than_the_context_changes_nothing(session: ChatSession) -> None:
    list(session.send("one"))
    before = list(session.messages)
    with pytest.raises(RequestError, match=r"tokens, the context of the model is 300"):
        list(session.send("long " * 100))
    assert session.messages == before
    assert "".join(session.send("two")) == ANSWER


def test_a_conversation_that_the_template_refuses_changes_nothing(write_checkpoint) -> None:
    refusing = write_checkpoint(chat_template="{{ raise_exception('not today') }}")
    session = ChatSession(load_model(refusing), SamplingParams())
    with pytest.raises(RequestError, match="not today"):
        list(session.send("one"))
    assert session.messages == []


def test_a_model_without_a_tokenizer_takes_no_texts(tiny) -> None:
    with pytest.raises(RequestError, match="no tokenizer"):
        list(ChatSession(tiny.plain, SamplingParams()).send("one"))


# ---- The cache between turns.


@pytest.fixture
def babble(tiny) -> Iterator[Callable[..., ChatSession]]:
    """Makes sessions with a model of random weights, which has always more to say."""
    made: list[ChatSession] = []
    model = tiny.random(tiny.config, tokenizer=tiny.tokenizer)

    def make(**fields: Any) -> ChatSession:
        params = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **fields})
        made.append(ChatSession(model, params))
        return made[-1]

    yield make
    for session in made:
        session.close()


def cold(session: ChatSession, messages: list[dict[str, str]], **fields: Any) -> str:
    """The answer to these messages without any cache, without a character that its end cuts: it may become whole."""
    model = session._model
    params = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **fields})
    output = generate(model, model.tokenizer.encode_chat(messages), params)[0]
    detokenizer = model.tokenizer.detokenizer()
    text = "".join(map(detokenizer.add, output.token_ids))
    assert output.text == text + detokenizer.finish()
    return text


def test_a_turn_computes_only_what_is_new(babble) -> None:
    session = babble()
    answers = ["".join(session.send(text)) for text in ("one " * 20, "two")]
    # The pages of the first prompt, of 80 characters and those around them.
    assert session.engine.stats().reused_tokens >= 64
    assert answers[1] == cold(session, session.messages[:-1])
    answers.append("".join(session.send("three")))
    assert answers[2] == cold(session, session.messages[:-1])


def test_the_newest_answer_is_taken_in_while_the_user_types(babble) -> None:
    session = babble(max_tokens=100)
    list(session.send("one"))
    session._preparing.results(timeout=60)
    computed = session.engine.stats().prompt_tokens
    before = session.engine.stats().reused_tokens
    list(session.send("two"))
    asked = session._model.tokenizer.encode("two<|im_end|>\n<|im_start|>assistant\n")
    known = len(session._newest.prompt_ids) - len(asked)
    assert session.engine.stats().reused_tokens - before == known // 64 * 64 >= 64
    assert computed >= known - 64


def test_a_message_need_not_wait_for_what_is_prepared(babble) -> None:
    session = babble()
    for text in ("one " * 30, "two", "three"):
        assert "".join(session.send(text)) == cold(session, session.messages[:-1])


def test_a_conversation_that_outgrows_the_cache_gets_a_larger_one(babble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jllm_runtime.chat.local.MIN_TOKENS", 1)
    session = babble()
    list(session.send("one"))
    small = session.engine
    assert small.config.pages == 4
    assert "".join(session.send("long " * 48)) == cold(session, session.messages[:-1])
    assert session.engine.config.pages == 5
    assert small.closed


def test_an_answer_ends_where_the_memory_does(babble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jllm_runtime.engine.pool_size._spare_bytes", lambda *_: 2 * PAGE_BYTES)
    session = babble(max_tokens=200)
    list(session.send("one"))
    assert len(session._newest.prompt_ids) + session.cut_at == 2 * 64 + 1


PAGE_BYTES = 2 * 2 * 2 * 8 * 64 * 4  # keys and values, layers, heads, head_dim, tokens, float32


def test_lookup_answers_the_same(model: Model) -> None:
    session = ChatSession(model, SamplingParams(), lookup=7)
    assert "".join(session.send("one")) == ANSWER
    assert "".join(session.send("two")) == ANSWER
    assert session.engine is None


def test_the_cache_takes_the_dtype(model: Model) -> None:
    session = ChatSession(model, SamplingParams(), kv_dtype="bfloat16")
    assert "".join(session.send("one")) == ANSWER
    assert session.engine.config.kv_dtype == "bfloat16"
    session.close()


# ---- Going on, going back, and settings.


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_that_was_cut_goes_on_as_if_it_had_not_been(babble, temperature: float) -> None:
    session = babble(max_tokens=5, temperature=temperature, seed=3)
    list(session.send("one"))
    assert session.cut_at == 5
    list(session.resume())
    list(session.resume())
    assert session.cut_at == 15
    assert session.messages == [
        user("one"),
        assistant(cold(session, [user("one")], max_tokens=15, temperature=temperature, seed=3)),
    ]


def test_an_answer_that_was_stopped_goes_on(babble) -> None:
    session = babble(max_tokens=40, temperature=1.0)
    pieces = session.send("one")
    next(pieces)
    pieces.close()
    list(session.resume())
    whole = cold(session, [user("one")], max_tokens=80, temperature=1.0, seed=session._newest.params.seed)
    assert whole.startswith(session.messages[1]["content"])
    assert len(session._newest.token_ids) > 40


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    "data", [b"a\xe6\xbc\xe6\xbc", b"\xc3\xf0\x9f\x98|\x80", b"\xe6|\xbc\xa2|\xe6", b"\xe6|\xbc|\xff"]
)
def test_a_character_waits_at_a_cut_and_is_lost_nowhere(
    tiny, monkeypatch: pytest.MonkeyPatch, data: bytes, skip: bool
) -> None:
    """Wherever the answer is cut and continued, and with special tokens (here "|") between the bytes."""
    model = tiny.random(tiny.config, tokenizer=tiny.tokenizer)
    byte_ids = {tiny.tokenizer.token_bytes(number): number for number in range(256)}
    special = tiny.tokenizer.token_id("<|im_start|>")
    ids = [special if byte == ord("|") else byte_ids[bytes([byte])] for byte in data]
    output, seen = OutputStream(model, ChatPrompt([0]), SamplingParams(max_tokens=99, skip_special_tokens=skip)), []
    for token in ids:
        output.accept(token)
        seen.append(output.take_text())

    def answer(self: ChatSession, prompt: list[int], params: SamplingParams) -> Iterator[Piece]:
        stream = OutputStream(model, prompt, params)
        for token in ids[len(self._newest.token_ids) if self._newest else 0 :][: params.max_tokens]:
            stream.accept(token)
            yield Piece(stream.take_text(), [token], stream.output(Timings()) if stream.finish_reason else None)

    monkeypatch.setattr(ChatSession, "_pieces", answer)
    for cut in range(1, len(ids)):
        session = ChatSession(model, SamplingParams(max_tokens=cut, ignore_eos=True, skip_special_tokens=skip))
        assert "".join(session.send("one")) == "".join(seen[:cut])
        session.set("max_tokens", len(ids) - cut)
        assert "".join(session.resume()) == "".join(seen[cut:])


def test_a_whole_answer_is_not_continued(session: ChatSession) -> None:
    for _ in range(2):
        with pytest.raises(RequestError, match="there is nothing to continue"):
            list(session.resume())
        list(session.send("one"))
    session.undo()
    with pytest.raises(RequestError, match="there is nothing to continue"):
        list(session.resume())


def test_a_full_context_is_said(babble) -> None:
    session = babble(max_tokens=300)
    list(session.send("one"))
    with pytest.raises(RequestError, match="the context of the model, 300 tokens, is full"):
        list(session.resume())
    assert len(session.messages) == 2


def test_regenerate_draws_anew(babble) -> None:
    session = babble(temperature=1.0, seed=3)
    first = "".join(session.send("one"))
    assert first == cold(session, [user("one")], temperature=1.0, seed=3)
    for seed in (4, 5):
        again = "".join(session.regenerate())
        assert again == cold(session, [user("one")], temperature=1.0, seed=seed) != first
        assert session.messages == [user("one"), assistant(again)]
    list(session.send("two"))
    assert session.messages[-1] == assistant(cold(session, session.messages[:-1], temperature=1.0, seed=3))


def test_undo_takes_back_a_question_and_its_answer(session: ChatSession) -> None:
    list(session.send("one"))
    list(session.send("two"))
    assert session.undo() == "two"
    assert session.messages == [user("one"), assistant(ANSWER)]
    assert session.undo() == "one"
    assert session.messages == []
    for ask in (session.undo, lambda: list(session.regenerate())):
        with pytest.raises(RequestError, match="nothing has been asked"):
            ask()


def test_a_system_message_is_set_and_taken_away(session: ChatSession) -> None:
    list(session.send("one"))
    session.set_system("be brief")
    assert session.messages == [system("be brief"), user("one"), assistant(ANSWER)]
    session.set_system("be kind")
    assert [message["content"] for message in session.messages] == ["be kind", "one", ANSWER]
    session.reset()
    assert session.messages == [system("be kind")]
    session.set_system("")
    assert session.messages == []


def test_settings_hold_for_the_answers_to_come(babble) -> None:
    session = babble()
    assert session.settings()["temperature"] == 0
    session.set("temperature", 1.0)
    session.set("seed", 7)
    session.set("max_tokens", 3)
    assert "".join(session.send("one")) == cold(session, [user("one")], temperature=1.0, seed=7, max_tokens=3)
    with pytest.raises(RequestError, match="top_p must be from 0 to 1"):
        session.set("top_p", 2.0)
    session.set("temperature", DEFAULT)
    session.set("seed", DEFAULT)
    assert (session.settings()["temperature"], session.settings()["seed"]) == (0, None)


@pytest.mark.parametrize("text", ["\ud800", "one\udcff"])
def test_text_that_is_no_utf_8_is_refused_with_its_position(session: ChatSession, text: str) -> None:
    for refuse in (lambda: list(session.send(text)), lambda: session.set_system(text)):
        with pytest.raises(RequestError, match=rf"not valid text: character {len(text)} is"):
            refuse()
    assert session.messages == []


# ---- Thinking.

THINKING_TEMPLATE = """\
{%- for message in messages -%}
<{{ message.role }}>{{ message.content.split('</think>')[-1] }}
{%- endfor -%}
<assistant>{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"""


@pytest.fixture
def thinker(write_checkpoint, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ChatSession]:
    """Makes sessions with a model that thinks; its answers come in these pieces."""
    models: dict[str, Model] = {}

    def make(*texts: str, template: str = THINKING_TEMPLATE, **variables: Any) -> ChatSession:
        if template not in models:
            models[template] = load_model(write_checkpoint(chat_template=template))
        model = models[template]
        session = ChatSession(model, SamplingParams(), variables=variables)
        session.prompts = []

        def pieces(prompt: list[int], _: SamplingParams) -> Iterator[Piece]:
            session.prompts.append(model.tokenizer.decode(prompt))
            yield from (Piece(text, []) for text in texts)

        monkeypatch.setattr(session, "_pieces", pieces)
        return session

    return make


def test_thinking_is_shown_as_such_and_kept_apart(thinker) -> None:
    session = thinker("<thi", "nk>\nHm", ".\n</think>", "\n\nYes", "!")
    pieces = list(session.send("?"))
    assert pieces == ["Hm", ".", "Yes", "!"]
    assert [isinstance(piece, Thinking) for piece in pieces] == [True, True, False, False]
    assert session.messages == [user("?"), {**assistant("Yes!"), "reasoning_content": "Hm."}]
    list(session.send("Sure?"))
    # What the next prompt has of it is the template's own business; it gets both.
    assert session.prompts == ["<user>?<assistant>", "<user>?<assistant>Yes!<user>Sure?<assistant>"]


# As Qwen3.5's to 3.8's: the prompt opens the thinking, and the model may see that of earlier turns.
OPENING_TEMPLATE = """\
{%- for message in messages -%}
{%- set thought = message.reasoning_content if preserve_thinking -%}
<{{ message.role }}>{% if thought %}<think>{{ thought }}</think>{% endif %}{{ message.content }}
{%- endfor -%}
<assistant><think>
{% if enable_thinking is defined and enable_thinking is false %}
</think>

{% endif %}"""


@pytest.mark.parametrize(("kept", "earlier"), [({}, ""), ({"preserve_thinking": True}, "<think>Hm.</think>")])
def test_the_prompt_may_open_the_thinking(kept: dict[str, Any], earlier: str, thinker) -> None:
    session = thinker("Hm", ".\n</th", "ink>\n\nYes", "!", template=OPENING_TEMPLATE, **kept)
    pieces = list(session.send("?"))
    assert pieces == ["Hm", ".", "Yes", "!"]
    assert [isinstance(piece, Thinking) for piece in pieces] == [True, True, False, False]
    assert session.messages == [user("?"), {**assistant("Yes!"), "reasoning_content": "Hm."}]
    list(session.send("Sure?"))
    assert session.prompts[1] == f"<user>?<assistant>{earlier}Yes!<user>Sure?<assistant><think>\n"
    session.set("think", False)
    assert [isinstance(piece, Thinking) for piece in session.send("?")] == [False] * 4


def test_thinking_can_be_switched_off(thinker, session: ChatSession) -> None:
    switched = thinker("Yes")
    assert switched.settings()["think"] == DEFAULT
    switched.set("think", False)
    list(switched.send("?"))
    switched.set("think", DEFAULT)
    list(switched.send("!"))
    assert [prompt.endswith("<think></think>") for prompt in switched.prompts] == [True, False]
    assert "think" not in session.settings()
    with pytest.raises(RequestError, match="has no variable enable_thinking"):
        session.set("think", True)


# ---- Files.


def test_a_conversation_is_saved_and_loaded(tmp_path: Path) -> None:
    messages = [system("é"), user("one\ntwo"), {**assistant("ok"), "reasoning_content": "hm"}]
    save_messages(tmp_path / "chat.json", messages)
    assert load_messages(tmp_path / "chat.json") == messages == json.loads((tmp_path / "chat.json").read_text("utf-8"))
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]


def test_a_file_of_others_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(RequestError, match=r"there is a file .*mine already"):
        save_messages(tmp_path / "mine", [user("one")])
    assert (tmp_path / "mine").read_text() == "precious"
    with pytest.raises(RequestError, match="cannot be saved in"):
        save_messages(tmp_path / "no" / "folder", [user("one")])


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    save_messages(tmp_path / "old", [user("one")])
    monkeypatch.setattr(os, "replace", fail)
    for name, overwrite in (("old", True), ("new", False)):
        with pytest.raises(RequestError, match="no space left"):
            save_messages(tmp_path / name, [user("two")], overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert load_messages(tmp_path / "old") == [user("one")]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "cannot be read"),
        ("{}", "must be a list of messages, got dict"),
        ("[1]", 'message 1 in .* must have a "role"'),
        ('[{"role": "tool", "content": ""}]', 'message 1 in .* must have a "role"'),
        ('[{"role": "user"}]', 'message 1 in .* must have a "role"'),
        ('[{"role": "user", "content": 1}]', "content must be a text, got int"),
        ('[{"role": "user", "content": "\\ud800"}]', "content of message 1 in .* is not valid text: character 1"),
        ('[{"role": "user", "content": ""}, {"role": "system", "content": ""}]', "message 2 in .* is a system message"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "chat.json").write_text(text)
    with pytest.raises(RequestError, match=problem):
        load_messages(tmp_path / "chat.json")


# ---- What is typed.


@pytest.mark.parametrize(
    ("text", "still_open", "message"),
    [
        ("one", False, None),
        ('"""', True, ""),
        ('"""one', True, "one"),
        ('"""one\ntwo"""', False, "one\ntwo"),
        (' """\none\n""" ', False, "one"),
        ('say """', False, None),
    ],
)
def test_quotes_hold_several_lines_together(text: str, still_open: bool, message: str | None) -> None:
    assert is_open(text) == still_open
    assert unquoted(text) == message


def test_the_history_is_private_and_takes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JLLM_CACHE", str(tmp_path / "new"))
    open_history(history_path()).store_string("one\ntwo")
    open_history(history_path()).store_string("\ud800")
    assert stat.S_IMODE(history_path().stat().st_mode) == 0o600
    assert list(open_history(history_path()).load_history_strings())[-1] == "one\ntwo"


def test_a_history_that_cannot_be_kept_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    open_history(tmp_path / "file" / "history").store_string("one")
    assert "is not kept for the next chat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one two three", "one two\nthree"),
        ("one two  three\nfour", "one two\nthree\nfour"),
        ("12345678 9", "12345678\n9"),
        ("1234567890 1", "1234567890 1"),
        ("a 1234567890 1", "a\n1234567890 1"),
        ("1234567890123 4", "1234567890123 4"),
        ("1234567890123 456", "1234567890123\n456"),
        ("ab日本語cd e", "ab日本語\ncd e"),
        ("  - one two", "  - one\ntwo"),
        ("one\n\n\ntwo ", "one\n\n\ntwo "),
        ("日本語日本語", "日本語日\n本語"),
        ("```py\none two three\n```\none two three", "```py\none two three\n```\none two\nthree"),
    ],
)
def test_words_wrap_however_the_text_is_cut(text: str, shown: str) -> None:
    for size in range(1, len(text) + 1):
        wrap = WordWrap(lambda: 8)
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert "".join([*map(wrap.feed, pieces), wrap.finish()]) == shown


def test_a_word_is_shown_as_soon_as_it_is_whole() -> None:
    wrap = WordWrap(lambda: 8)
    assert [wrap.feed(piece) for piece in ("on", "e t", "wo", "\n", "th")] == ["", "one", "", " two\n", ""]


# ---- The terminal.


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch, session: ChatSession) -> Callable[..., None]:
    """Runs a chat in which a user types these lines; an exception is what the terminal raises. Ctrl-D comes last."""

    def run(*lines: str | BaseException) -> None:
        typed = iter([*lines, EOFError()])

        def read(_: str = "") -> str:
            line = next(typed)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", read)
        run_chat(session)
        assert (left := len(list(typed))) == 0 or {"/exit", "/quit"} & {*lines}, f"{left} lines were not read"

    return run


def test_a_line_is_answered(type_in, session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    type_in("  hello ")
    assert capsys.readouterr().out == f"{ANSWER}\n"
    assert session.messages == [user("hello"), assistant(ANSWER)]


def test_an_empty_line_is_no_message(type_in, session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    type_in("", "   ")
    assert capsys.readouterr().out == ""
    assert session.messages == []


def test_help_lists_the_commands(type_in, session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    type_in("/help")
    out = capsys.readouterr().out
    assert all(command in out for command in ("/help", "/reset", "/exit", "Ctrl-C", "Ctrl-D"))
    assert session.messages == []


def test_reset_forgets(type_in, session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    type_in("hello", "/reset")
    assert session.messages == []
    assert "forgotten" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["/exit", "/quit"])
def test_exit_leaves(command: str, type_in, session: ChatSession) -> None:
    type_in(command, "hello")
    assert session.messages == []


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        *(("/think Why?", "/think Why?"), ("/no_think", "/no_think"), ("/usr/bin is what?", "/usr/bin is what?")),
        *(("//help", "/help"), ("//", "/"), ('"""/reset"""', "/reset"), ("/RESET", "/RESET")),
    ],
)
def test_what_is_no_command_reaches_the_model(typed: str, sent: str, type_in, session: ChatSession, capsys) -> None:
    type_in(typed)
    assert session.messages == [user(sent), assistant(ANSWER)]
    assert "is a command" not in capsys.readouterr().err


def test_a_typo_of_a_command_is_sent_with_a_remark(type_in, session: ChatSession, capsys) -> None:
    type_in("/rest now")
    assert "(sent to the model; /reset is a command)" in capsys.readouterr().err
    assert session.messages == [user("/rest now"), assistant(ANSWER)]


def test_ctrl_c_at_the_prompt_goes_on(type_in, session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    type_in(KeyboardInterrupt(), "hello")
    assert "leaves" in capsys.readouterr().err
    assert session.messages == [user("hello"), assistant(ANSWER)]


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(
    type_in, session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ChatSession, "_pieces", interrupted_after("Hi", ", y"))
    type_in("one", "two")
    assert capsys.readouterr().out == "Hi, y (stopped)\n" * 2
    assert session.messages == [user("one"), assistant("Hi, y"), user("two"), assistant("Hi, y")]


def test_a_conversation_that_is_too_long_is_an_error_and_the_chat_goes_on(
    type_in, session: ChatSession, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in("long " * 100, "hello")
    out, err = capsys.readouterr()
    assert "the context of the model is 300" in err
    assert "/reset" in err
    assert out == f"{ANSWER}\n"
    assert session.messages == [user("hello"), assistant(ANSWER)]


@pytest.fixture
def press(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has the user press Ctrl-C so often when the first piece of an answer is shown."""

    def set_up(times: int) -> None:
        from jllm_runtime.chat.terminal import _Printer

        left, show = [times], _Printer.show

        def show_and_press(printer: _Printer, piece: str) -> None:
            show(printer, piece)
            while left[0]:
                left[0] -= 1
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(_Printer, "show", show_and_press)

    return set_up


def test_ctrl_c_cancels_the_request_without_an_exception(babble, press, monkeypatch, capsys) -> None:
    session = babble(max_tokens=250)
    press(1)
    lines = iter(["one", "/set max_tokens 5", "/continue"])
    monkeypatch.setattr(builtins, "input", lambda _="": next(lines, None) or (_ for _ in ()).throw(EOFError))
    reasons, resume = [], session.resume
    monkeypatch.setattr(session, "resume", lambda: (reasons.append(session._newest.reason), resume())[1])
    run_chat(session)
    out, err = capsys.readouterr()
    assert " (stopped)\n" in out
    assert reasons == ["cancelled"]
    assert "/continue goes on" in err
    assert cold(session, [user("one")], max_tokens=250).startswith(session.messages[1]["content"])


def test_ctrl_c_twice_leaves(babble, press, monkeypatch, capsys) -> None:
    press(2)
    session = babble(max_tokens=250)
    lines = iter(["one", "two"])
    monkeypatch.setattr(builtins, "input", lambda _="": next(lines))
    run_chat(session)
    assert " (stopped)\n" in capsys.readouterr().out
    assert next(lines) == "two"
    assert len(session.messages) == 2


def test_ctrl_c_twice_at_the_prompt_leaves(monkeypatch: pytest.MonkeyPatch, session: ChatSession) -> None:
    presses = iter([KeyboardInterrupt(), KeyboardInterrupt()])

    def read(_: str = "") -> str:
        raise next(presses)

    monkeypatch.setattr(builtins, "input", read)
    run_chat(session)
    assert list(presses) == []


def test_the_commands_of_a_conversation(type_in, session: ChatSession, tmp_path: Path, capsys) -> None:
    file = tmp_path / "a chat.json"
    type_in(
        "/system be brief", "one", f"/save {file}", "two", "/undo", "/regenerate", "/save", "/reset", f"/load {file}"
    )
    out, err = capsys.readouterr()
    assert session.messages == [system("be brief"), user("one"), assistant(ANSWER)]
    assert "(the system message is set)" in out
    assert f"(3 messages in {file})" in out
    assert "(taken back: two)" in out
    assert f"(3 messages from {file})" in out
    assert "it is greedy" in err
    assert out.count(ANSWER) == 3


def test_commands_say_what_they_cannot_do(type_in, session: ChatSession, tmp_path: Path, capsys) -> None:
    (tmp_path / "there").write_text("")
    type_in("/continue", "/undo", "/save", f"/save {tmp_path / 'there'}", "/load", "/load nowhere", "/set tone 1")
    err = capsys.readouterr().err
    assert err.count("Error: ") == 7
    assert "there are temperature, top_k" in err
    assert session.messages == []


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("/set", "temperature           0.0"),
        ("/set temperature", "temperature is 0.0"),
        ("/set temperature 0.7", "(temperature is 0.7 from now on)"),
        ("/set top-k 5", "(top_k is 5 from now on)"),
        ("/set seed default", "(seed is default from now on)"),
        ("/set temperature hot", "temperature must be a number or default, got 'hot'"),
        ("/set top_k 1.5", "top_k must be a whole number or default, got '1.5'"),
        ("/set temperature -1", "temperature must be 0 or above"),
        ("/system", "(there is no system message)"),
        ("/system -", "(there is no system message now)"),
    ],
)
def test_settings_are_shown_and_changed(type_in, typed: str, said: str, capsys) -> None:
    type_in(typed)
    out, err = capsys.readouterr()
    assert said in out + err


def test_an_answer_that_is_cut_says_so(babble, monkeypatch, capsys) -> None:
    lines = iter(["one", "/continue"])
    monkeypatch.setattr(builtins, "input", lambda _="": next(lines, None) or (_ for _ in ()).throw(EOFError))
    run_chat(babble(max_tokens=5), "a heading")
    err = capsys.readouterr().err
    assert err.startswith("a heading\n")
    assert "(cut at 5 tokens; /continue goes on)" in err
    assert "(cut at 10 tokens; /continue goes on)" in err


def test_several_lines_in_quotes_are_one_message(type_in, session: ChatSession) -> None:
    type_in('"""one', "/reset", 'two"""')
    assert session.messages == [user("one\n/reset\ntwo"), assistant(ANSWER)]


def test_a_message_that_is_no_utf_8_is_an_error_and_the_chat_goes_on(type_in, session: ChatSession, capsys) -> None:
    type_in("\udcff", "hello")
    assert "character 1 is the byte 0xFF" in capsys.readouterr().err
    assert session.messages == [user("hello"), assistant(ANSWER)]
