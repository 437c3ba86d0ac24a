"""What the tests of jllm-core share: tiny models, and their checkpoints."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import Mesh
from jllm_core import ModelConfig, Quantization, Weights, abstract_weights
from jllm_core.array_info import ArrayInfo, named_leaves
from jllm_core.checkpoint import MODEL_FILE, Manifest, save_weights
from jllm_core.sharding import Placement


@pytest.fixture(scope="session")
def make_config() -> Callable[..., ModelConfig]:
    """A small model with grouped heads; keyword arguments change it."""

    def make(**changes: Any) -> ModelConfig:
        sizes = {"vocab_size": 13, "hidden_size": 12, "intermediate_size": 10, "num_layers": 2, "context_length": 64}
        heads = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 4}
        return ModelConfig(**{"model_type": "llama", **sizes, **heads, **changes})

    return make


@pytest.fixture(scope="session")
def make_weights() -> Callable[..., Weights]:
    """Random weights, large enough that every one of them shows in the logits (made by numpy: nothing to compile)."""

    def make(config: ModelConfig, dtype: Any = jnp.float32, seed: int = 0) -> Weights:
        random = np.random.default_rng(seed)

        def values(info: ArrayInfo) -> jax.Array:
            is_gamma = info.initializer is jax.nn.initializers.ones
            return jnp.asarray(random.normal(1.0 if is_gamma else 0.0, 0.3, info.shape).astype(info.dtype))

        return jax.tree.map(values, abstract_weights(config, dtype))

    return make


@pytest.fixture(scope="session")
def save_model() -> Callable[[Path, ModelConfig, Weights], Path]:
    """Writes a whole checkpoint, as a converter does."""

    def save(folder: Path, config: ModelConfig, weights: Weights, quantization: Quantization | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.asarray(array) for name, array in named_leaves(weights).items()}
        dtype = arrays["gamma_final"].dtype
        entries = save_weights(folder, arrays, named_leaves(abstract_weights(config, dtype, quantization)))
        (folder / MODEL_FILE).write_text(config.to_json())
        Manifest(dtype=dtype.name, arrays=entries, quantization=quantization).write(folder)
        return folder

    return save


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """Calls as a user's own are: without the checks of jaxtyping, which would refuse a wrong type before we do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def one_cpu() -> Placement:
    return Placement(Mesh(np.array(jax.local_devices(backend="cpu")[:1]), ("data",)))


@pytest.fixture(scope="session", autouse=True)
def code_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Machine code of the tests' own, so that they do not run what an earlier test run has left."""
    patch = pytest.MonkeyPatch()
    patch.setenv("JLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()
