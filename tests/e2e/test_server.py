"""The real model behind a server, through OpenAI's own client."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def url(smollm2_folder: Path, cache_folder: Path) -> Iterator[str]:
    """``jllm serve`` with the real model; it must end well."""
    command = [sys.executable, "-m", "jllm_runtime.cli", "serve", str(smollm2_folder), "--port", "0"]
    environment = {**os.environ, "JLLM_CACHE": str(cache_folder)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    with process.stderr as lines:
        found = next(match for line in lines if (match := re.search(r"at (http://\S+) \(loaded", line)))
        next(line for line in lines if "startup complete" in line)
        try:
            yield found[1]
        finally:
            process.send_signal(signal.SIGTERM)
            lines.read()
            assert process.wait(60) == 0


def test_the_capital_of_france(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        [model] = client.models.list()
        reply = client.chat.completions.create(model=model.id, messages=QUESTION, temperature=0)
        assert "Paris" in (reply.choices[0].message.content or "")
        assert reply.choices[0].finish_reason == "stop"
        chunks = list(client.chat.completions.create(model=model.id, messages=QUESTION, temperature=0, stream=True))
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert streamed == reply.choices[0].message.content
        assert len(chunks) > 3
