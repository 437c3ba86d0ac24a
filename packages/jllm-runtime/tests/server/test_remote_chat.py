"""Chat session with a model behind a server. The model answers everything with "Hi, you!"."""

import builtins
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from jllm_runtime.chat.conversation import Thinking
from jllm_runtime.chat.remote import RemoteSession
from jllm_runtime.cli import main
from jllm_runtime.errors import RequestError, ServerError

ANSWER = "Hi, you!"


@pytest.fixture
def fake() -> Iterator[Callable[..., str]]:
    """Starts a server that answers a chat with these lines, whatever it is asked."""
    servers: list[HTTPServer] = []

    def start(lines: str = "", status: int = 200, models: Any = None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(200, json.dumps({"data": [{"id": "it"}]} if models is None else models))

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.reply(status, lines)

            def reply(self, code: int, text: str) -> None:
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def jllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs ``jllm`` while a user types "hello" and leaves."""

    def run(*arguments: str) -> tuple[int, str, str]:
        typed = iter(["hello"])

        def read(_: str = "") -> str:
            for line in typed:
                return line
            raise EOFError

        monkeypatch.setattr(builtins, "input", read)
        monkeypatch.setattr("sys.argv", ["jllm", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(str(end.code))
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


def event(**delta: str) -> str:
    return f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n"


# ---- The conversation.


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_question_and_answer_are_remembered(ending: str, server) -> None:
    session = RemoteSession(server.url + ending, system="Be brief.")
    assert session.model == "tiny"
    assert "".join(session.send("one")) == ANSWER
    assert "".join(session.send("two")) == ANSWER
    roles = [message["role"] for message in session.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert session.messages[-1]["content"] == ANSWER
    session.reset()
    assert session.messages == [{"role": "system", "content": "Be brief."}]


def test_an_answer_that_is_stopped_stops_the_server(babbling) -> None:
    session = RemoteSession(babbling.url, params={"max_tokens": 250})
    answer = session.send("one")
    said = next(answer)
    answer.close()
    babbling.wait_until_empty()
    assert session.messages[1] == {"role": "assistant", "content": said}


def test_the_server_s_own_words_say_why_it_refuses(server) -> None:
    session = RemoteSession(server.url)
    with pytest.raises(ServerError, match=r"the server refuses: the prompt has 334 tokens, at most 299 are taken"):
        list(session.send("long " * 63))
    assert session.messages == []
    assert "".join(session.send("two")) == ANSWER


def test_thoughts_are_shown_and_not_kept(fake) -> None:
    said = event(content="Yes") + event(content="!") + "data: [DONE]\n"
    session = RemoteSession(fake(event(reasoning_content="Hm.") + ": a comment\n\n" + said))
    pieces = list(session.send("?"))
    assert pieces == ["Hm.", "Yes", "!"]
    assert [isinstance(piece, Thinking) for piece in pieces] == [True, False, False]
    assert session.messages[1]["content"] == "Yes!"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"lines": event(content="Y")}, "has hung up before the end"),
        ({"lines": 'data: {"error": {"message": "out of luck"}}\n'}, "the server has failed: out of luck"),
        ({"lines": "data: {\n"}, "what is no event"),
        ({"lines": "<html>", "status": 502}, "the server refuses: 502 Bad Gateway"),
        ({"lines": '{"error": {"message": "busy"}}', "status": 429}, "the server refuses: busy"),
    ],
)
def test_a_server_that_fails(answer: dict[str, Any], message: str, fake) -> None:
    session = RemoteSession(fake(**answer))
    with pytest.raises(ServerError, match=message):
        list(session.send("?"))


@pytest.mark.parametrize("models", [[], {"data": 5}, {"data": [{}]}, "x"])
def test_what_is_no_such_server(models: Any, fake) -> None:
    with pytest.raises(ServerError, match="does not speak the OpenAI API"):
        RemoteSession(fake(models=models))


def test_a_server_that_cannot_be_had(server, serve, talker, fake) -> None:
    with pytest.raises(ServerError, match="cannot be reached"):
        RemoteSession("http://127.0.0.1:9")
    for url in ("ftp://localhost", "http://", "unix:///x"):
        with pytest.raises(ServerError, match="must be like http://localhost:8000"):
            RemoteSession(url)
    with pytest.raises(ServerError, match="has no model gpt-9; it has tiny"):
        RemoteSession(server.url, "gpt-9")
    with pytest.raises(ServerError, match=r"has no model$"):
        RemoteSession(fake(models={"data": []}))
    with serve(talker, api_keys=("key",)) as locked:
        with pytest.raises(ServerError, match="an API key is needed"):
            RemoteSession(locked.url)
        assert "".join(RemoteSession(locked.url, api_key="key").send("one")) == ANSWER


@pytest.mark.parametrize(("params", "cut_at"), [({"max_tokens": 3}, 3), ({}, 0)])
def test_an_answer_that_the_server_cuts_is_known_as_such(fake, params: dict[str, int], cut_at: int) -> None:
    def ended(reason: str) -> str:
        end = json.dumps({"choices": [{"delta": {}, "finish_reason": reason}]})
        return event(content="Yes") + f"data: {end}\n\ndata: [DONE]\n"

    session = RemoteSession(fake(ended("length")), params=params)
    list(session.send("?"))
    assert session.cut_at == cut_at
    with pytest.raises(RequestError, match="cannot be continued here"):
        list(session.resume())
    whole = RemoteSession(fake(ended("stop")), params=params)
    list(whole.send("?"))
    assert whole.cut_at is None


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of a server from now on; the first is for the names of the models."""
    found: list[Any] = []
    respond = RemoteSession._response

    def record(session: RemoteSession, method: str, path: str, body: Any = None) -> Any:
        found.append(json.loads(json.dumps(body)))
        return respond(session, method, path, body)

    monkeypatch.setattr(RemoteSession, "_response", record)
    return found


def test_settings_are_fields_of_the_requests_to_come(fake, bodies: list[Any]) -> None:
    url = fake(event(content="Yes") + "data: [DONE]\n")
    session = RemoteSession(url, params={"max_tokens": 5, "chat_template_kwargs": {"enable_thinking": True}})
    for name, value in {"temperature": 0.5, "max_tokens": 7, "think": False}.items():
        session.set(name, value)
        assert session.settings()[name] == value
    list(session.send("one"))
    for name in ("temperature", "max_tokens", "think"):
        session.set(name, "default")
    list(session.regenerate())
    fields = [{name: value for name, value in body.items() if name not in ("model", "stream")} for body in bodies[1:]]
    asked = [{"role": "user", "content": "one"}]
    assert fields == [
        {"temperature": 0.5, "max_tokens": 7, "chat_template_kwargs": {"enable_thinking": False}, "messages": asked},
        {"max_tokens": 5, "chat_template_kwargs": {"enable_thinking": True}, "messages": asked},
    ]


def test_an_answer_is_regenerated_with_the_next_seed(fake, bodies: list[Any]) -> None:
    session = RemoteSession(fake(event(content="Yes") + "data: [DONE]\n"), params={"seed": 7})
    list(session.send("one"))
    list(session.regenerate())
    list(session.regenerate())
    list(session.send("two"))
    session.set("seed", "default")
    list(session.regenerate())
    assert [body["seed"] for body in bodies[1:]] == [7, 8, 9, 7, 8]
    assert session.settings()["seed"] == 7


def test_a_server_draws_a_seed_where_none_is_set(fake, bodies: list[Any]) -> None:
    session = RemoteSession(fake(event(content="Yes") + "data: [DONE]\n"))
    list(session.send("one"))
    list(session.regenerate())
    assert all("seed" not in body for body in bodies[1:])


# ---- The command.


def test_chat_with_a_server(jllm, server) -> None:
    code, out, _ = jllm("chat", "--server", server.url)
    assert (code, out) == (0, f"{ANSWER}\n")
    code, out, _ = jllm("chat", "tiny", "--server", server.url, "--max-tokens", "3", "--stop", "x", "--top-k", "1")
    assert (code, out) == (0, "Hi,\n")
    code, _, err = jllm("chat", "--server", server.url, "--max-tokens", "3", "--template-var", "tone=kind")
    assert f"tiny at {server.url}: max_tokens 3; all else as the server has it" in err
    assert "no variable 'tone'" in err


def test_the_key_may_come_from_the_environment(jllm, serve, talker, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(talker, api_keys=("secret",)) as locked:
        assert jllm("chat", "--server", locked.url, "--api-key", "secret")[1] == f"{ANSWER}\n"
        monkeypatch.setenv("JLLM_API_KEY", "secret")
        assert jllm("chat", "--server", locked.url)[1] == f"{ANSWER}\n"


def test_options_that_make_no_sense(jllm, server) -> None:
    code, _, err = jllm("chat", "--server", server.url, "--dtype", "float32")
    assert (code, "--dtype is for a model that is loaded here" in err) == (2, True)
    code, _, err = jllm("chat")
    assert (code, "give a MODEL, or a server with --server URL" in err) == (2, True)
    code, _, err = jllm("chat", "--server", "http://127.0.0.1:9")
    assert (code, "cannot be reached" in err) == (1, True)  # it may be there a moment later
