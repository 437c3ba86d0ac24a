"""Chat session in the terminal. The model answers everything with "Hi, you!"."""

import builtins
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jllm_runtime import Model, Piece, RequestError, SamplingParams, load_model
from jllm_runtime.chat.local import ChatSession
from jllm_runtime.chat.terminal import run_chat

ANSWER = "Hi, you!"


@pytest.fixture(scope="module")
def model(friendly_checkpoint) -> Model:
    return load_model(friendly_checkpoint)


@pytest.fixture
def session(model: Model) -> ChatSession:
    return ChatSession(model, SamplingParams())


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def interrupted_after(*texts: str) -> Callable[..., Iterator[Piece]]:
    """A ``stream_generate`` that somebody stops with Ctrl-C."""

    def pieces(*_: Any, **__: Any) -> Iterator[Piece]:
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

    def record(_: Model, prompt: list[int], params: SamplingParams, **__: object) -> Iterator[Piece]:
        given.append((model.tokenizer.decode(prompt, skip_special_tokens=False), params))
        yield Piece("yes", [])

    monkeypatch.setattr("jllm_runtime.chat.local.stream_generate", record)
    params = SamplingParams(max_tokens=3)
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
    monkeypatch.setattr("jllm_runtime.chat.local.stream_generate", interrupted_after("Hi", ", y"))
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
        assert (left := len(list(typed))) == 0 or "/exit" in lines, f"{left} lines were not read"

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


def test_exit_leaves(type_in, session: ChatSession) -> None:
    type_in("/exit", "hello")
    assert session.messages == []


def test_an_unknown_command_is_no_message(type_in, session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    type_in("/rest now")
    out = capsys.readouterr().out
    assert "There is no /rest." in out
    assert "/reset" in out
    assert session.messages == []


def test_ctrl_c_at_the_prompt_goes_on(type_in, session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    type_in(KeyboardInterrupt(), "hello")
    assert "leaves" in capsys.readouterr().err
    assert session.messages == [user("hello"), assistant(ANSWER)]


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(
    type_in, session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jllm_runtime.chat.local.stream_generate", interrupted_after("Hi", ", y"))
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
