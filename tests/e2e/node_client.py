"""The real model, through OpenAI's own client for JavaScript.

It takes node, npm and their registry, so this runs in an environment of its own: ``hatch run clients:test``. The name
keeps it out of the ordinary suite.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CLIENT = ("openai_client.test.mjs", "package.json")
# Before SmolLM2's own template, which knows no tools.
TOOLS = """\
{%- if tools %}<|im_start|>system
You may call these functions:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}A call is <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call><|im_end|>
{% endif -%}
"""


@pytest.fixture(scope="module")
def model(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real weights, with a chat template that knows tools."""
    folder = tmp_path_factory.mktemp("clients") / "smollm2"
    shutil.copytree(smollm2_folder, folder, copy_function=os.link)
    own = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    (folder / "chat_template.jinja").write_text(TOOLS + own)
    return folder


@pytest.fixture(scope="module")
def url(model: Path, serving: Callable[..., AbstractContextManager[str]]) -> Iterator[str]:
    """``jllm serve`` as it is."""
    with serving(model, "--pages", 256) as found:
        yield found


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client in it."""
    folder = tmp_path_factory.mktemp("client")
    for name in CLIENT:
        shutil.copy(HERE / name, folder)
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"], cwd=folder, check=True)
    return folder


def test_it_works_as_it_is(url: str, client: Path) -> None:
    environment = {**os.environ, "JLLM_URL": url}
    command = ["node", "--test", "--test-reporter=tap"]
    ran = subprocess.run(command, cwd=client, env=environment, stdout=subprocess.PIPE, text=True, timeout=600)
    version = json.loads((client / "node_modules" / "openai" / "package.json").read_text())["version"]
    print(ran.stdout, f"openai {version}, node", subprocess.check_output(["node", "--version"], text=True))
    assert ran.returncode == 0
    counts = {
        name: int(count) for name, count in re.findall(r"^# (pass|fail|skipped) (\d+)$", ran.stdout, re.MULTILINE)
    }
    assert counts["pass"] > 0
    assert (counts["fail"], counts["skipped"]) == (0, 0)
