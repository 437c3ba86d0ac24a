"""Chat templates as strangers' programs: they are bounded in time and memory, and harm nobody but their own request."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from jllm_runtime import Tokenizer
from jllm_runtime.errors import RequestError
from jllm_runtime.named_templates import ChatTemplates
from jllm_runtime.server import template_processes
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.template_processes import MAX_IDLE, MAX_PROCESSES, RENDER_TIMEOUT, TemplateProcesses
from jllm_runtime.server.template_worker import to_message

CHAT = "/v1/chat/completions"
NAME = "tiny"
LOOP = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
ASKED = {"sources": {"default": LOOP}, "special": {}, "messages": [], "variables": {}}
# Loops on one conversation, and answers all others.
TEMPLATE = f"{{% if messages[0].content == 'loop' %}}{LOOP}{{% endif %}}{{{{ messages[0].content }}}}"


@pytest.fixture
def processes() -> Iterator[TemplateProcesses]:
    yield from opened(30)


@pytest.fixture
def impatient() -> Iterator[TemplateProcesses]:
    yield from opened(0.5)


def opened(timeout: float) -> Iterator[TemplateProcesses]:
    processes = TemplateProcesses(timeout)
    yield processes
    processes.close()


def rendered(
    processes: TemplateProcesses, template: str, messages: list[dict[str, Any]], variables: dict[str, Any]
) -> str:
    return processes.render(ChatTemplates({"default": template}, {}), messages, variables)


@contextmanager
def looping(processes: TemplateProcesses) -> Iterator[list[Exception]]:
    """A rendering that never ends, on another thread, and the error that it comes to."""
    errors: list[Exception] = []

    def render() -> None:
        with pytest.raises((ApiError, RequestError)) as caught:
            rendered(processes, LOOP, [], {})
        errors.append(caught.value)

    thread = threading.Thread(target=render)
    thread.start()
    while not processes._busy:
        time.sleep(0.01)
    yield errors
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("content", ["hi", "é\u2028\n", "\U0001f600", "half \ud800"])
def test_a_text_comes_back_as_it_is(processes: TemplateProcesses, content: str) -> None:
    template = "<{{ messages[0].content }}> {{ flag }} {{ tools }}"
    assert rendered(processes, template, [{"content": content}], {"flag": True}) == f"<{content}> True None"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'x' * 10**9 }}", "takes more than 512 MiB of memory"),
        ("{{ '%1000000000d' % 1 }}", "takes more than 512 MiB of memory"),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
            "takes more than 512 MiB of memory",
        ),
        ("{{ 'x' * 10**7 }}", "makes 10000000 characters of it, at most 4194"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "maximum recursion depth exceeded"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ raise_exception('not so') }}", "does not take this conversation: not so"),
        ("{% if %}", "does not take this conversation: "),
    ],
)
def test_what_a_template_may_not_do(processes: TemplateProcesses, template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        rendered(processes, template, [], {})
    assert rendered(processes, "well", [], {}) == "well"


@pytest.mark.parametrize("template", [LOOP, "{{ 7 ** (9 ** 9) }}"])
def test_a_template_that_takes_too_long_is_killed(impatient: TemplateProcesses, template: str) -> None:
    with pytest.raises(ApiError, match=r"has taken more than 0.5 s") as caught:
        rendered(impatient, template, [], {})
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")
    assert not impatient._idle
    assert rendered(impatient, "well", [], {}) == "well"


def test_processes_are_used_again_and_few_are_kept(processes: TemplateProcesses) -> None:
    processes.start()
    [first] = processes._idle
    for _ in range(3):
        rendered(processes, "a", [], {})
    assert processes._idle == [first]
    with ThreadPoolExecutor(8) as threads:
        texts = threads.map(lambda number: rendered(processes, "{{ messages[0].x }}", [{"x": number}], {}), range(24))
        assert list(texts) == [str(number) for number in range(24)]
    assert len(processes._idle) == MAX_IDLE
    assert not processes._busy


def test_a_process_that_is_killed_is_said_and_replaced(processes: TemplateProcesses) -> None:
    with looping(processes) as errors:
        next(iter(processes._busy)).kill()
    assert str(errors[0]).endswith("has ended the process that renders it (exit code -9)")
    assert rendered(processes, "well", [], {}) == "well"
    processes._idle[0].kill()
    processes._idle[0].wait()
    assert rendered(processes, "well", [], {}) == "well"


def test_closing_ends_what_is_rendered(processes: TemplateProcesses) -> None:
    processes.start()
    rendered(processes, "well", [], {})
    with looping(processes) as errors:
        processes.close()
    assert "shutting down" in str(errors[0])
    with pytest.raises(ApiError, match="shutting down"):
        rendered(processes, "late", [], {})


def test_a_process_is_light_and_ends_with_its_server() -> None:
    module = "jllm_runtime.server.template_worker"
    code = f"import sys, {module}; print({{'jax', 'numpy', 'pydantic', 'fastapi', 'tokenizers'}} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
    # A server that is killed closes nothing in good order. Its process then ends itself, though its template loops.
    process = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(to_message({**ASKED, "seconds": 1}))
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGALRM


def test_a_long_rendering_leaves_the_cores_to_the_model() -> None:
    module = "jllm_runtime.server.template_worker"
    process = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(to_message({**ASKED, "seconds": 20}))
    process.stdin.flush()
    try:
        end = time.monotonic() + 15
        while os.getpriority(os.PRIO_PROCESS, process.pid) < 19:
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()


# ---- Behind the server.


@pytest.fixture
def looper(talker):
    """A model whose template loops on the conversation "loop"."""
    tokenizer = Tokenizer(talker.tokenizer._raw, talker.tokenizer._settings, TEMPLATE)
    return dataclasses.replace(talker, tokenizer=tokenizer)


def chat(content: str, **fields: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": [{"role": "user", "content": content}], **fields}


def test_others_go_on_while_eight_chats_loop(serve, looper) -> None:
    def say_hi() -> None:
        reply = server.post(CHAT, chat("hi"))
        assert reply.is_success, reply.text
        assert reply.json()["choices"][0]["message"]["content"].endswith("you!")

    with serve(looper, request_timeout=60) as server:
        server.engine.generate([[1, 2]])  # the programs are compiled now, outside of the request's time
        replies: list[Any] = []
        threads = [
            threading.Thread(target=lambda: replies.append(server.post(CHAT, chat("loop"), timeout=60)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        server.wait_until(lambda: len(server.server._service.template_processes._busy) == 8)
        for _ in range(2):
            say_hi()
            assert server.post("/v1/completions", {"model": NAME, "prompt": "a", "max_tokens": 2}).is_success
            assert server.post("/tokenize", {"messages": chat("hi")["messages"]}).json()["count"] == 2
            assert server.get("/v1/models").is_success
        assert not replies
        server.server.drain()
        for thread in threads:
            thread.join()
        assert len(replies) == 8
        server.wait_until(lambda: server.server._service.idle)
        server.wait_until_empty()


def test_each_of_eight_chats_that_loop_ends_with_the_time_of_a_request(serve, looper) -> None:
    with serve(looper, request_timeout=6) as server:
        replies: list[Any] = []

        def post() -> None:
            began = time.monotonic()
            reply = server.post(CHAT, chat("loop"))
            replies.append((time.monotonic() - began, reply))

        threads = [threading.Thread(target=post) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(replies) == 8
        for seconds, reply in replies:
            assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
            assert 5 < seconds < 12
        server.wait_until(lambda: server.server._service.idle)
        server.wait_until_empty()


def test_more_chats_that_loop_than_processes_wait_for_one_another_shortly(serve, looper, monkeypatch) -> None:
    """While others wait for its process, a rendering has ``CROWDED_TIMEOUT``."""
    monkeypatch.setattr(template_processes, "CROWDED_TIMEOUT", 0.5)
    with serve(looper, request_timeout=60) as server:
        server.engine.generate([[1, 2]])
        replies: list[Any] = []
        threads = [
            threading.Thread(target=lambda: replies.append(server.post(CHAT, chat("loop"), timeout=60)))
            for _ in range(MAX_PROCESSES)
        ]
        for thread in threads:
            thread.start()
        processes = server.server._service.template_processes
        server.wait_until(lambda: len(processes._busy) == MAX_PROCESSES)
        assert server.post(CHAT, chat("hi")).is_success
        server.wait_until(lambda: bool(replies))
        ended = [reply.json()["error"] for reply in replies]
        assert {error["code"] for error in ended} == {"timeout"}
        assert all("more than 0.5 s, while others wait, with this" in error["message"] for error in ended)
        # One ends for each that waits; the others, for whose processes nobody waits, go on.
        assert len(ended) < MAX_PROCESSES / 2
        assert processes._ending_for_others == 0
        server.server.drain()
        for thread in threads:
            thread.join()


def test_one_rendering_ends_for_each_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    processes, waiting = template_processes.TemplateProcesses(), SimpleNamespace(tasks_waiting=2)
    monkeypatch.setattr(processes, "_threads", SimpleNamespace(statistics=lambda: waiting))
    assert [processes._makes_room() for _ in range(4)] == [True, True, False, False]
    # One of the two has its place, and makes no more room.
    processes._give_back(processes._take(), reusable=False, made_room=True)
    waiting.tasks_waiting = 1
    assert not processes._makes_room()
    processes._give_back(processes._take(), reusable=False, made_room=True)
    assert processes._makes_room()


def test_a_rendering_ends_with_its_request(serve, looper) -> None:
    """Its process would compute on for nobody, beside as many others as there are clients that come and go."""
    with serve(looper, request_timeout=60) as server:
        processes = server.server._service.template_processes
        began = time.monotonic()
        for _ in range(2):
            with pytest.raises(httpx.ReadTimeout):
                server.post(CHAT, chat("loop"), timeout=0.5)
        server.wait_until(lambda: not processes._busy)
        assert time.monotonic() - began < RENDER_TIMEOUT
        assert server.post(CHAT, chat("hi")).is_success


def test_a_server_ends_though_a_template_loops(serve, looper) -> None:
    with serve(looper, drain_timeout=0.3) as server:
        replies: list[Any] = []
        thread = threading.Thread(target=lambda: replies.append(server.post(CHAT, chat("loop"))))
        thread.start()
        server.wait_until(lambda: bool(server.server._service.template_processes._busy))
        [process] = server.server._service.template_processes._busy
        server.server.drain()
        thread.join(5)
        assert (replies[0].status_code, replies[0].json()["error"]["code"]) == (503, "shutting_down")
    assert process.wait(5) == -signal.SIGKILL


def test_a_template_that_loops_on_everything_is_served_by_completions(serve, talker) -> None:
    tokenizer = Tokenizer(talker.tokenizer._raw, talker.tokenizer._settings, "</think>" + LOOP)
    with serve(dataclasses.replace(talker, tokenizer=tokenizer), request_timeout=1) as server:
        assert server.post("/v1/completions", {"model": NAME, "prompt": "a", "max_tokens": 2}).is_success
        [card] = server.get("/v1/models").json()["data"]
        assert card["abilities"]["thinking"]
        reply = server.post("/tokenize", {"messages": chat("hi")["messages"]})
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
        assert "the model's chat template has taken more than 1 s" in reply.json()["error"]["message"]
