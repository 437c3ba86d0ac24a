"""What benchmarks/serve.py and benchmarks/soak.py share: a server process, and a client that notes when things come.

The client speaks HTTP over asyncio's streams itself, so that it costs little beside a server on the same machine.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from smollm2 import converted


def random_small_model(folder: Path) -> Path:
    """Two thin layers of random weights with SmolLM2's tokenizer: what costs time is the server, not the model."""
    path = folder / "small"
    if path.exists():
        return path
    import dataclasses
    import shutil

    import jax
    from jllm_core import abstract_weights, checkpoint, init_weights
    from jllm_core.array_info import named_leaves

    real = converted("float32", folder)
    config = dataclasses.replace(
        checkpoint.read_config(real),
        num_layers=2,
        hidden_size=64,
        intermediate_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
    )
    made = path.with_suffix(".part")
    made.mkdir()
    arrays = named_leaves(init_weights(config, jax.random.key(0)))
    entries = checkpoint.save_weights(made, arrays, named_leaves(abstract_weights(config)))
    for file in real.iterdir():
        if file.is_file():
            shutil.copy(file, made)
    (made / checkpoint.MODEL_FILE).write_text(config.to_json())
    checkpoint.Manifest(dtype="float32", arrays=entries).write(made)
    return made.rename(path)


class Server:
    """A ``jllm serve`` process, from its start to its end; a context manager.

    Attributes:
        url: where it listens.
        ready_s: seconds from its start until it was ready.
        load_s: seconds that it says it took to load the model.
    """

    def __init__(self, model: Path, *options: str, log: Path, port: int = 0, timeout: float = 300) -> None:
        command = [sys.executable, "-m", "jllm_runtime.cli", "serve", str(model), "--port", str(port), *options]
        started = time.perf_counter()
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        self.url = ""
        while not self._ready():
            if self._process.poll() is not None or time.perf_counter() - started > timeout:
                self.kill()
                raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.01)
        self.ready_s = time.perf_counter() - started

    def get(self, path: str) -> Any:
        """The JSON at this path."""
        with urllib.request.urlopen(self.url + path, timeout=30) as reply:
            return json.load(reply)

    def rss(self) -> int:
        """Bytes of memory that it holds."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]

    def kill(self) -> None:
        """End it at once, as a crash would."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()

    def _ready(self) -> bool:
        if not self.url:
            found = re.search(
                r"Serving .* at (http://\S+) \(loaded in ([\d.]+) s[;)]", self._log.read_text(errors="replace")
            )
            if found is None:
                return False
            self.url, self.load_s = found[1], float(found[2])
        try:
            self.get("/ready")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False
        return True


@dataclass
class Reply:
    """What came back, and when.

    Attributes:
        began: when the request was sent, by ``time.perf_counter``.
        status: of HTTP; 0 where there was no answer at all.
        times: when each event with text came.
        text: of the answer.
        usage: as the server counts.
        finish_reason: why it ended.
        error: of the server, or why there was no whole answer.
        message: an answer that was no stream.
        ended: when the last byte came.
    """

    began: float
    status: int = 0
    times: list[float] = field(default_factory=list)
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    error: str | None = None
    message: dict[str, Any] = field(default_factory=dict)
    ended: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of the answer."""
        return int(self.usage.get("completion_tokens", 0))

    @property
    def first_s(self) -> float:
        """Seconds to the first text."""
        return self.times[0] - self.began

    @property
    def gaps(self) -> list[float]:
        """Seconds between one event with text and the next."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


async def ask(
    url: str, body: Any, path: str = "/v1/chat/completions", on_text: Callable[[Reply], Any] | None = None
) -> Reply:
    """Ask, and read the answer to its end, a stream or not.

    Args:
        url: of the server.
        body: what is sent as JSON; bytes are sent as they are.
        path: the endpoint.
        on_text: called after each event with text; what it returns, if it can be awaited, is waited for.
    """
    address = urlsplit(url)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = Reply(time.perf_counter())
    try:
        reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=2**20)
    except OSError as error:
        reply.error, reply.ended = f"no connection: {error}", time.perf_counter()
        return reply
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
        await writer.drain()
        status, headers = await _head(reader)
        reply.status = status
        if "text/event-stream" in headers.get("content-type", ""):
            await _events(reader, reply, on_text)
        else:
            _whole(await reader.readexactly(int(headers.get("content-length", 0))), reply)
    except (OSError, EOFError, ValueError) as error:
        reply.error = f"{type(error).__name__}: {error}"
    finally:
        reply.ended = time.perf_counter()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return reply


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    line, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    headers = (field.split(":", 1) for field in fields)
    return int(line.split()[1]), {name.lower(): value.strip() for name, value in headers}


async def _events(reader: asyncio.StreamReader, reply: Reply, on_text: Callable[[Reply], Any] | None) -> None:
    held, ended = b"", False
    while size := int(await reader.readuntil(b"\r\n"), 16):
        held += (await reader.readexactly(size + 2))[:-2]
        *events, held = held.split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data: ")
            ended = ended or data == b"[DONE]"
            if data != b"[DONE]" and _take(json.loads(data), reply) and on_text is not None:
                waited = on_text(reply)
                if waited is not None:
                    await waited
    if not ended and reply.error is None:
        reply.error = "the stream ended early"


def _take(event: dict[str, Any], reply: Reply) -> bool:
    """Note an event; whether it has text."""
    if "error" in event:
        reply.error = event["error"]["message"]
        return False
    reply.usage = event.get("usage") or reply.usage
    has_text = False
    for choice in event["choices"]:
        text = choice["delta"].get("content") if "delta" in choice else choice["text"]
        reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
        if text:
            reply.text += text
            has_text = True
    if has_text:
        reply.times.append(time.perf_counter())
    return has_text


def _whole(content: bytes, reply: Reply) -> None:
    message = json.loads(content)
    if "error" in message:
        reply.error = message["error"]["message"]
    else:
        reply.message, reply.usage = message, message.get("usage", {})


@contextlib.contextmanager
def using_cache(folder: Path) -> Iterator[None]:
    """Have servers keep their compiled programs in this folder."""
    before = os.environ.get("JLLM_CACHE")
    os.environ["JLLM_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["JLLM_CACHE"]
        else:
            os.environ["JLLM_CACHE"] = before
