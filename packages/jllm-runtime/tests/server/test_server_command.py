"""Command ``jllm serve``, in processes of its own: start, signals, end."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jllm_runtime import EngineConfig
from jllm_runtime.cli import main
from jllm_runtime.server import command
from jllm_runtime.server.command import served_name
from jllm_runtime.server.config import ServerConfig
from jllm_runtime.server.server import PortTakenError, bind, listen

CHAT = "/v1/chat/completions"
STREAM = {
    "model": "long",
    "messages": [{"role": "user", "content": "hello"}],
    "stream": True,
    "ignore_eos": True,
    "stream_options": {"include_usage": True},
}


@dataclasses.dataclass
class Process:
    """``jllm serve`` as it runs."""

    popen: subprocess.Popen[str]
    url: str
    log: list[str]

    def stream(self, max_tokens: int) -> "Stream":
        return Stream(self.url, max_tokens)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, self.log
            time.sleep(0.02)

    def end(self, *signals: int) -> None:
        for number in signals:
            self.popen.send_signal(number)
            time.sleep(0.3)


class Stream(threading.Thread):
    """Reads a stream to its end."""

    def __init__(self, url: str, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._url, self._max_tokens = url, max_tokens
        self.events: list[Any] = []
        self.start()
        while not self.events:
            assert self.is_alive()
            time.sleep(0.01)

    def run(self) -> None:
        body = STREAM | {"max_tokens": self._max_tokens}
        with httpx.stream("POST", self._url + CHAT, json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    self.events.append(json.loads(line.removeprefix("data: ")))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def long_checkpoint(write_checkpoint, tiny) -> Path:
    """A model that says anything for a long time."""
    return write_checkpoint(config=dataclasses.replace(tiny.config, context_length=100_000))


@pytest.fixture
def start(cache: Path, long_checkpoint: Path) -> Iterator[Callable[..., Process]]:
    """Starts ``jllm serve``."""
    started: list[subprocess.Popen[str]] = []

    def run(*options: str, **environment: str) -> Process:
        arguments = ("serve", str(long_checkpoint), "--port", "0", "--pages", "1600", "--served-model-name", "long")
        popen = subprocess.Popen(
            [sys.executable, "-m", "jllm_runtime.cli", *arguments, *options],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JLLM_CACHE": str(cache), **environment},
        )
        started.append(popen)
        assert popen.stderr is not None
        first = popen.stderr.readline()
        assert re.fullmatch(rf"{re.escape(str(long_checkpoint))} on \d+ x cpu, float32 \(.*\)\n", first), first
        for line in popen.stderr:
            if found := re.search(r"Serving .* at (http://\S+) \(loaded", line):
                break
        assert found, popen.wait()
        log: list[str] = []
        # Read on, so that the process never waits for a reader.
        threading.Thread(target=lambda: [log.append(line) for line in popen.stderr], daemon=True).start()
        process = Process(popen, found[1], log)
        end = time.monotonic() + 60
        # Nobody is refused from that line on.
        while not httpx.get(f"{process.url}/ready", timeout=60).is_success:
            assert time.monotonic() < end
            time.sleep(0.05)
        return process

    yield run
    for popen in started:
        popen.kill()
        popen.wait()
        assert popen.stderr is not None
        popen.stderr.close()


@pytest.fixture
def jllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs ``jllm`` in this process, which must end by itself."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["jllm", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(str(end.code))
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out + err

    return run


# ---- How it ends.


def test_it_lets_what_runs_end_first(start: Callable[..., Process]) -> None:
    process = start()
    stream = process.stream(max_tokens=1500)
    process.end(signal.SIGTERM)
    # Whoever asks how it is gets told, and new work is refused, while the stream goes on.
    ready = httpx.get(f"{process.url}/ready")
    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "shutting_down")
    assert httpx.get(f"{process.url}/health").is_success
    for path, body in ((CHAT, STREAM), ("/v1/completions", {"model": "long", "prompt": "a"})):
        refused = httpx.post(process.url + path, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert refused.headers["retry-after"] == "1"
    assert stream.is_alive()
    stream.join(60)
    assert stream.events[-1]["usage"]["completion_tokens"] == 1500
    assert process.popen.wait(20) == 0


def test_it_says_what_it_waits_for(start: Callable[..., Process]) -> None:
    process = start("--drain-timeout", "300")
    short, long = process.stream(max_tokens=1500), process.stream(max_tokens=90_000)
    assert httpx.get(f"{process.url}/stats").json()["draining"] is None
    process.end(signal.SIGINT)
    draining = httpx.get(f"{process.url}/stats").json()["draining"]
    assert draining["answers"] == 2
    assert 200 < draining["seconds_left"] < 300
    short.join(60)
    process.wait_for(lambda: len(waits(process)) == 2)
    assert httpx.get(f"{process.url}/stats").json()["draining"]["answers"] == 1
    process.end(signal.SIGINT)
    assert process.popen.wait(20) == 0
    long.join(10)
    said = [(answers, int(seconds)) for answers, seconds in waits(process)]
    assert [answers for answers, _ in said] == ["2 answers", "1 answer"]
    assert 200 < said[1][1] <= said[0][1] <= 300


def waits(process: Process) -> list[tuple[str, str]]:
    found = [re.fullmatch(r"Waiting for (.*), at most (\d+) s; Ctrl-C again ends it\n", line) for line in process.log]
    return [(line[1], line[2]) for line in found if line]


def test_it_does_not_wait_for_ever(start: Callable[..., Process]) -> None:
    process = start("--drain-timeout", "1")
    stream = process.stream(max_tokens=90_000)
    began = time.monotonic()
    process.end(signal.SIGTERM)
    assert process.popen.wait(20) == 0
    assert 1 <= time.monotonic() - began < 10
    stream.join(10)
    assert stream.events[-1]["error"]["code"] == "shutting_down"


def test_a_trace_is_closed_at_the_end(start: Callable[..., Process], tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    process = start("--trace", str(path))
    process.stream(max_tokens=70).join(60)
    process.end(signal.SIGTERM)
    assert process.popen.wait(20) == 0
    events = json.loads(path.read_text())
    assert events[-1]["name"] == "closed"
    # The server's own tiny request before the first one, and ours.
    ends = [event["args"] for event in events if event["ph"] == "E" and event["name"].startswith("sequence")]
    assert [end["generated_tokens"] for end in ends] == [2, 70]


def test_a_trace_survives_sigkill(start: Callable[..., Process], tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    process = start("--trace", str(path))
    asked = STREAM | {"max_tokens": 90_000}
    with (
        contextlib.suppress(httpx.HTTPError),
        httpx.stream("POST", process.url + CHAT, json=asked, timeout=60) as response,
    ):
        for _ in response.iter_lines():
            if path.read_text().count('"name":"decode"') > 20:
                process.popen.kill()
    assert process.popen.wait(20) == -signal.SIGKILL
    text = path.read_text()
    events = json.loads(text.removesuffix(",\n") + "]")
    begun = [event["name"] for event in events if event["ph"] == "B" and event["tid"] == 2]
    assert begun == ["sequence 2", "waiting", "prefill", "decode"]


def test_a_trace_that_cannot_be_written_is_refused_before_the_model_is_looked_for(jllm, tmp_path: Path) -> None:
    code, said = jllm("serve", tmp_path / "no-model", "--trace", tmp_path / "none" / "trace.json")
    assert (code, "cannot write a trace to" in said, "no-model" in said) == (2, True, False)


def test_a_second_signal_ends_it_at_once(start: Callable[..., Process]) -> None:
    process = start("--api-key", "one", JLLM_API_KEYS="two, three,")
    assert [
        httpx.get(f"{process.url}/stats", headers={"Authorization": f"Bearer {key}"}).status_code
        for key in ("one", "two", "three", "four", "one,two")
    ] == [200, 200, 200, 401, 401]
    process.end(signal.SIGINT)
    assert process.popen.wait(20) == 0  # nothing was under way


def test_a_second_signal_does_not_wait(start: Callable[..., Process]) -> None:
    process = start()
    stream = process.stream(max_tokens=90_000)
    process.end(signal.SIGINT, signal.SIGINT)
    assert process.popen.wait(10) == 0
    stream.join(10)
    assert stream.events[-1]["error"]["code"] == "shutting_down"


# ---- How it does not start.


def test_a_port_that_is_taken(jllm, friendly_checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = jllm("serve", friendly_checkpoint, "--port", port)
    assert code == 1
    assert f"cannot listen at 127.0.0.1 port {port}: Address already in use" in said
    assert "--port takes another port" in said


def test_a_port_that_is_taken_while_the_model_is_loaded() -> None:
    with socket.socket() as first:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        first.bind(("127.0.0.1", 0))
        config = ServerConfig(port=first.getsockname()[1])
        with bind(config) as second:
            first.listen()
            with pytest.raises(PortTakenError, match="--port takes another port"):
                listen(config, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--port", "70000"), "port must be from 0 to 65535, got 70000"),
        (("--max-queue", "0"), "max_queue must be 1 or above"),
        (("--max-batch", "0"), "max_batch must be a whole number, 1 or above"),
        (("--page-size", "48"), "page_size must be a power of two"),
        (("--api-key", ""), "an API key must be printable ASCII"),
        (("--host", "no.such.host.invalid"), "cannot listen at no.such.host.invalid port 8000"),
        (("--host", "192.0.2.1"), "cannot listen at 192.0.2.1 port 8000: Cannot assign requested address"),
        (("--cors-origin", "x"), "a CORS origin must be like"),
        (("--nonsense",), "No such option"),
    ],
)
def test_wrong_options_are_told_before_the_model_is_loaded(options: tuple[str, ...], message: str, jllm) -> None:
    code, said = jllm("serve", "no-model", *options)
    assert (code, message in said) == (2, True), said


def test_a_model_is_named_in_requests_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "my-model").symlink_to("elsewhere")
    (tmp_path / "tiny.Q4_1.gguf").touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert served_name("../tiny.Q4_1.gguf") == "tiny.Q4_1.gguf"
    assert served_name(str(tmp_path / "my-model")) == "my-model"
    assert served_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert (served_name("."), served_name("..")) == ("elsewhere", tmp_path.name)


def test_a_model_that_is_none(jllm) -> None:
    code, said = jllm("serve", "no-model", "--port", 0)
    assert (code, "there is no model at no-model" in said) == (2, True)


def test_a_model_that_takes_no_texts(jllm, write_checkpoint) -> None:
    code, said = jllm("serve", write_checkpoint(tokenizer=False), "--port", 0, "--pages", 4, "--no-compile-cache")
    assert (code, "the model has no tokenizer, and a server takes texts" in said) == (2, True)


def test_a_missing_extra_is_named(jllm, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("jllm_runtime.server.")]:
        if name not in ("jllm_runtime.server.command", "jllm_runtime.server.config"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, said = jllm("serve", "no-model")
    assert (code, "serving needs uvicorn" in said) == (1, True)
    assert "pip install 'jllm-runtime[serve]'" in said


def test_help_lists_every_setting(jllm) -> None:
    code, said = jllm("serve", "--help")
    assert code == 0
    options = {option for line in said.splitlines() for option in re.findall(r"^  (?:-h, )?(--[a-z-]+)", line)}
    settings = {f"--{name.replace('_', '-')}" for name in (*command.DEFAULTS, *command.ENGINE_FIELDS)}
    renamed = {"--names": "--served-model-name", "--api-keys": "--api-key", "--cors-origins": "--cors-origin"}
    renamed |= {"--allowed-hosts": "--allowed-host", "--template-vars": "--template-var", "--warm-up": "--warmup"}
    assert {renamed.get(name, name) for name in settings} <= options
    assert "JLLM_API_KEYS" in said


def test_the_engine_s_defaults_are_those_of_the_library() -> None:
    defaults = EngineConfig()
    by_name = command.serve.make_context("serve", ["some-model"]).params
    assert {name: by_name[name] for name in command.ENGINE_FIELDS if name != "pages"} == {
        name: getattr(defaults, name) for name in command.ENGINE_FIELDS if name != "pages"
    }
