"""Quantised weights on devices that hold them in a form of their own: loaded, run, saved; and what is said of them.

There are none: a CPU is told that it holds them as another kind would, and XLA computes with what it is given.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core import Quantization, init_weights
from jllm_core.array_info import array_bytes
from jllm_core.checkpoint import save_checkpoint
from jllm_core.quantization import device_form
from jllm_core.quantization.arrays import QuantizationError
from jllm_runtime import Model, load_model
from jllm_runtime.benchmarking.costs import local_bytes
from jllm_runtime.errors import ModelError
from jllm_runtime.planner.memory import Workload, bytes_per_device, estimate_memory, weights_info
from jllm_runtime.planner.plan import make_placement, make_plan
from jllm_runtime.planner.topologies import TOPOLOGIES, find_topology

INT8, INT4_G32, INT4_G64 = Quantization(8), Quantization(4, 32), Quantization(4, 64)


@pytest.fixture
def saved(tiny, tmp_path: Path) -> Callable[[Quantization], Path]:
    """Writes a quantised model, as the first edition did too."""

    def write(quantization: Quantization) -> Path:
        config = replace(tiny.config, hidden_size=64, intermediate_size=128, head_dim=64)
        weights = init_weights(config, jax.random.key(0), quantization=quantization)
        save_checkpoint(tmp_path / quantization.name, config, weights)
        return tmp_path / quantization.name

    return write


@pytest.fixture
def as_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets this device hold matrices as one of that kind."""
    real = device_form.device_form

    def put(kind: str) -> None:
        monkeypatch.setenv("JLLM_KERNELS", "xla")
        monkeypatch.setattr(device_form, "device_form", lambda _, activations=None: real(kind, activations))

    return put


@pytest.mark.parametrize(
    ("kind", "quantization"), [("TPU v2", INT4_G64), ("TPU v5 lite", INT4_G32), ("NVIDIA L4", INT4_G32)]
)
def test_an_old_checkpoint_runs_and_is_saved_as_it_was(
    saved: Callable[[Quantization], Path], as_on: Callable[[str], None], kind: str, quantization: Quantization, prompt
) -> None:
    folder = saved(quantization)
    stored = load_model(folder)
    as_on(kind)
    held = load_model(folder)
    q = held.weights.layers[0].attn.q
    assert q.is_grouped
    np.testing.assert_allclose(held.logits([prompt(9)]), stored.logits([prompt(9)]), atol=1e-3)
    held.save(folder.with_name("again"))
    for before, after in zip(*(files(folder) for folder in (folder, folder.with_name("again"))), strict=True):
        assert before == after


def files(folder: Path) -> list[tuple[str, bytes]]:
    """The chunks of all arrays."""
    chunks = sorted(path for path in (folder / "weights").rglob("*") if path.is_file() and "c" in path.parts)
    return [(str(path.relative_to(folder)), path.read_bytes()) for path in chunks]


@pytest.mark.parametrize(
    ("machine", "quantization", "bits"),
    [
        ("v5e-1", INT4_G64, 4),
        ("v5e-1", INT4_G32, 4),
        ("v2-8", INT4_G64, 4),
        ("v2-8", INT4_G32, 8),  # half a group in nibbles would fill half a tile
        ("h100", INT4_G32, 4),
        ("cpu", INT4_G32, 4),
    ],
)
def test_a_plan_counts_what_the_device_holds(machine: str, quantization: Quantization, bits: int, tiny) -> None:
    config = replace(tiny.config, hidden_size=256, intermediate_size=512, head_dim=64, num_heads=8, num_kv_heads=8)
    placement = make_placement(TOPOLOGIES[machine] if machine != "cpu" else find_topology("cpu"))
    workload = Workload(1, 64, "bfloat16", quantization)
    weights = weights_info(config, workload, placement)
    gate, devices = weights.layers[0].ffw.w_gate, placement.mesh.size
    assert bytes_per_device(gate.values, placement) == 256 * 512 * bits // 8 // devices
    assert bytes_per_device(weights, placement) == estimate_memory(config, workload, placement).weights


def test_int4_counts_half_a_byte() -> None:
    assert local_bytes({"values": jnp.zeros((4, 6), jnp.int4)}) == array_bytes((4, 6), jnp.int4) == 12


def test_activations_in_int8(saved: Callable[[Quantization], Path], as_on: Callable[[str], None], prompt) -> None:
    folder = saved(INT8)
    stored = load_model(folder)
    as_on("TPU v5 lite")
    rounded = load_model(folder, activations="int8")
    plain, logits = (np.asarray(model.logits([prompt(9)])) for model in (stored, rounded))
    assert 0 < np.abs(logits - plain).max() < 0.1 * np.abs(plain).max()


def test_activations_in_int8_are_for_channels_and_for_devices_that_have_them(
    saved: Callable[[Quantization], Path], friendly_checkpoint: Path
) -> None:
    with pytest.raises(ModelError, match=r"a scale a channel, .* is int4-g32; convert it with --quantize int8"):
        load_model(saved(INT4_G32), activations="int8")
    with pytest.raises(ModelError, match="is not quantised"):
        load_model(friendly_checkpoint, activations="int8")
    with pytest.raises(QuantizationError, match=r"TPU v5 lite, .*; this is cpu"):
        load_model(saved(INT8), activations="int8")


@pytest.mark.parametrize(
    ("machine", "quantization", "said"),
    [
        ("v2-8", INT4_G32, "in a byte each"),
        ("v2-8", INT4_G64, None),
        ("v5e-8", INT4_G32, None),
        ("h100", INT4_G32, "for groups of 32 than for groups of 128"),
        ("h100", Quantization(4, 128), None),
        ("h100", None, None),
    ],
)
def test_a_plan_says_what_a_grid_costs(machine: str, quantization: Quantization | None, said: str | None, tiny) -> None:
    config = replace(tiny.config, hidden_size=256, intermediate_size=512, head_dim=128)
    made = make_plan("tiny", config, TOPOLOGIES[machine], Workload(1, 64, "bfloat16", quantization))
    assert [note for note in made.notes if "groups" in note] == ([] if said is None else [made.notes[-1]])
    assert said is None or said in made.notes[-1]


def test_loading_says_what_a_grid_costs(
    saved: Callable[[Quantization], Path],
    as_on: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    as_on("TPU v2")
    monkeypatch.setattr(device_form, "_form_of", lambda _: device_form.TPU_BYTES)
    loaded: Any = load_model(saved(INT4_G32))
    assert isinstance(loaded, Model)
    assert "groups of 32 in a byte each" in caplog.text
