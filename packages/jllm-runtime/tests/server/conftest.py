"""Servers with tiny models, on real sockets."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from jllm_runtime import Engine, EngineConfig, Model, Tokenizer
from jllm_runtime.server.app import create_app
from jllm_runtime.server.config import ServerConfig
from jllm_runtime.server.server import DrainingServer, bind, uvicorn_config
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

# One set of sizes, so that programs are compiled once.
SIZES = EngineConfig(pages=64)
NAME = "tiny"
CALL = '{"name": "look_up", "arguments": {"city": "Paris"}}'
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", CALL, "Well. ", "Hm?"]

# Thinks, and calls tools in the format of Hermes.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool.function.name }}: {{ tool.function.description or "" }}{% endfor %}
<tool_call>{"name": "arguments"}</tool_call><|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls %}{{ call.function.arguments.city }}{% endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
{%- endif -%}
"""


@dataclasses.dataclass
class Served:
    """A server that runs.

    Attributes:
        engine: behind it.
        server: around it.
        url: where it is.
    """

    engine: Engine
    server: DrainingServer
    url: str

    def openai(self, **options: Any) -> openai.OpenAI:
        """OpenAI's own client; what it would repeat is to be seen."""
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "unused", "max_retries": 0, **options})

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        given = {"json": body, **options} if body is not None else options
        return httpx.post(f"{self.url}{path}", **{"timeout": 60, **given})

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=60, **options)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (self.engine.stats(), self.get("/stats").text)
            time.sleep(0.01)

    def wait_until_empty(self, seconds: float = 10) -> None:
        """Until the engine has nothing to do, and no page is held."""

        def is_empty() -> bool:
            stats = self.engine.stats()
            return (stats.running, stats.waiting, stats.pages_in_use) == (0, 0, 0)

        self.wait_until(is_empty, seconds)


@contextmanager
def served(model: Model, sizes: EngineConfig = SIZES, **options: Any) -> Iterator[Served]:
    config = ServerConfig(**{"port": 0, "names": (NAME,), **options})
    listener = bind(config)
    with Engine(model, sizes) as engine:
        app = create_app(engine, config)
        server = DrainingServer(uvicorn_config(app, log_level="warning"), app.state.service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.005)
            yield Served(engine, server, f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join()
            engine.close()


@pytest.fixture
def serve() -> Callable[..., Any]:
    """``with serve(model, EngineConfig(...), max_queue=2, ...) as server``."""
    return served


@pytest.fixture(scope="session")
def talker(tiny) -> Model:
    """Answers every conversation with "Hi, you!"."""
    return tiny.saying([*b"\nHi, you!", tiny.im_end], eos_ids=(tiny.im_end,))


@pytest.fixture(scope="session")
def babbler(tiny) -> Model:
    """Says anything."""
    return dataclasses.replace(tiny.plain, tokenizer=tiny.tokenizer, eos_ids=(tiny.end,))


@pytest.fixture(scope="session")
def marked_tokenizer(tiny) -> Tokenizer:
    """With marks of thoughts and calls as tokens, a whole call among them."""
    raw = RawTokenizer.from_str(tiny.tokenizer.to_json())
    raw.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    return Tokenizer(raw, {"eos_token": "<|end|>"}, TEMPLATE)


@pytest.fixture(scope="session")
def thinker(tiny, marked_tokenizer: Tokenizer) -> Model:
    """Thinks "Hm?", says "Well. ", and calls a tool."""
    said = "\n<think>Hm?</think>Well. <tool_call>" + CALL + "</tool_call><|im_end|>"
    ids = marked_tokenizer.encode(said, add_special_tokens=False)
    return dataclasses.replace(tiny.saying(ids, eos_ids=(tiny.im_end,)), tokenizer=marked_tokenizer)


@pytest.fixture(scope="session")
def server(talker: Model) -> Iterator[Served]:
    """Serves the model that says "Hi, you!"."""
    with served(talker) as running:
        yield running


@pytest.fixture(scope="session")
def babbling(babbler: Model) -> Iterator[Served]:
    """Serves the model that says anything."""
    with served(babbler) as running:
        yield running


@pytest.fixture(scope="session")
def thinking(thinker: Model) -> Iterator[Served]:
    """Serves the model that thinks and calls tools."""
    with served(thinker) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with server.openai() as made:
        yield made
