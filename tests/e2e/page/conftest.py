"""The page of a server without a model, open in a browser."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, Page

from .fake_server import FakeServer, scripted


@contextlib.contextmanager
def serving(fake: FakeServer) -> Iterator[FakeServer]:
    """The fake, on a socket of this machine."""
    listener = socket.create_server(("127.0.0.1", 0))
    fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    runner = uvicorn.Server(uvicorn.Config(fake.app(), log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not runner.started and time.monotonic() < deadline:
        time.sleep(0.01)
    yield fake
    runner.should_exit = True
    thread.join(timeout=30)
    listener.close()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving(FakeServer(scripted)) as fake:
        yield fake


@dataclass
class Complaints:
    """What a page had to complain about: errors in the console, exceptions, violations of its policy."""

    texts: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()

    def watch(self, page: Page) -> None:
        page.on("console", lambda message: message.type in ("error", "warning") and self.texts.append(message.text))
        page.on("pageerror", lambda error: self.texts.append(f"exception: {error}"))

    def unexpected(self) -> list[str]:
        return [text for text in self.texts if not any(part in text for part in self.expected)]


@contextlib.contextmanager
def opened(browser: Browser, url: str, complaints: Complaints, **options: Any) -> Iterator[Page]:
    """The page, in a browser that knows nothing yet. At the end it may have complained about nothing unexpected."""
    permissions = ["clipboard-read", "clipboard-write"]
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, "permissions": permissions, **options})
    context.set_default_timeout(10_000)
    page = context.new_page()
    complaints.watch(page)
    page.goto(url)
    yield page
    context.close()
    assert complaints.unexpected() == []


@pytest.fixture
def complaints() -> Complaints:
    return Complaints()


@pytest.fixture
def page(browser: Browser, server: FakeServer, complaints: Complaints) -> Iterator[Page]:
    with opened(browser, server.url, complaints) as page:
        yield page
