"""From a name to a model: resolvers, refusals, what a checkpoint says of the end of a text."""

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core import MoEConfig, checkpoint
from jllm_core.checkpoint import CheckpointError
from jllm_runtime import SamplingParams, generate, load_model, loading, make_mesh
from jllm_runtime.dtype_advice import float16_advice
from jllm_runtime.errors import ModelError
from jllm_runtime.loading import RESOLVERS, resolve_model

Resolver = Callable[[str], Path | None]


class Entry:
    """An entry point as importlib.metadata gives it."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver

    def load(self) -> Resolver:
        return self._resolver


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes these the resolvers that are installed, whatever really is."""
    others = importlib.metadata.entry_points

    def put(*resolvers: Resolver) -> None:
        def entry_points(**query: Any) -> Any:
            return [Entry(resolver) for resolver in resolvers] if query == {"group": RESOLVERS} else others(**query)

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)

    return put


@pytest.fixture
def damaged(friendly_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be damaged."""
    return Path(shutil.copytree(friendly_checkpoint, tmp_path / "damaged"))


# ---- What is loaded.


def test_a_checkpoint_is_loaded_as_it_was_written(write_checkpoint, tiny, prompt) -> None:
    folder = write_checkpoint()
    model = load_model(folder)
    assert (model.config, model.path) == (tiny.config, folder)
    assert jax.tree.structure(model.weights) == jax.tree.structure(tiny.plain.weights)
    for loaded, made in zip(jax.tree.leaves(model.weights), jax.tree.leaves(tiny.plain.weights), strict=True):
        np.testing.assert_array_equal(loaded, made)
    outputs = [generate(each, [prompt(9)], SamplingParams(max_tokens=5)) for each in (model, tiny.plain)]
    assert outputs[0][0].token_ids == outputs[1][0].token_ids


def test_the_name_may_be_a_text(friendly_checkpoint: Path) -> None:
    assert load_model(str(friendly_checkpoint)).path == friendly_checkpoint


def test_the_default_mesh_is_every_device(friendly_checkpoint: Path) -> None:
    assert load_model(friendly_checkpoint).mesh == make_mesh()


MIXTURE = """
from jllm_core import ShardingRules
from jllm_runtime import SamplingParams, generate, load_model, make_mesh
for mesh, rules in ((None, None), (make_mesh(), None), (None, ShardingRules(experts=None))):
    model = load_model({folder!r}, mesh, rules=rules)
    answer = generate(model, [[1, 2, 3], [4, 5]], SamplingParams(max_tokens=4))
    print(dict(model.mesh.shape), model.weights.layers[0].attn.q.sharding.spec, [each.token_ids for each in answer])
"""


def test_a_mixture_gets_a_mesh_for_its_experts(write_checkpoint, run_python, tiny) -> None:
    config = replace(tiny.config, moe=MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=16))
    folder = write_checkpoint(config=config)
    code = MIXTURE.replace("{folder!r}", repr(str(folder)))
    lines = [line.split("} ", 1) for line in run_python(code, devices=4).splitlines()]
    assert [json.loads(mesh.replace("'", '"') + "}") for mesh, _ in lines] == [
        {"data": 1, "expert": 4, "tensor": 1},
        {"data": 1, "expert": 1, "tensor": 4},
        {"data": 1, "expert": 1, "tensor": 4},
    ]
    # Attention is shared out over them all the same, and the answers are those of any mesh.
    assert "'expert'" in lines[0][1]
    assert len({text[text.index("[[") :] for _, text in lines}) == 1


def test_a_mesh_that_cuts_experts_across_lanes_is_told(
    friendly_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "partial_lanes", lambda config, placement: f"of {placement.mesh.size} device")
    assert load_model(friendly_checkpoint, make_mesh(devices=jax.devices()[:1])).mesh.size == 1
    assert "of 1 device" in caplog.text


@pytest.mark.parametrize(
    ("dtype", "loaded"), [(None, "float32"), ("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")]
)
def test_the_type_is_the_checkpoints_own_or_the_one_asked_for(
    dtype: str | None, loaded: str, friendly_checkpoint: Path
) -> None:
    weights = load_model(friendly_checkpoint, dtype=dtype).weights
    assert {array.dtype.name for array in jax.tree.leaves(weights)} == {loaded}


@pytest.mark.parametrize("smaller", ["bfloat16", "float16"])
def test_a_smaller_type_has_the_rounded_numbers(smaller: str, friendly_checkpoint: Path) -> None:
    exact, rounded = (load_model(friendly_checkpoint, dtype=dtype).weights for dtype in (None, smaller))
    np.testing.assert_array_equal(exact.embedding.astype(smaller), rounded.embedding)


class Gpu(NamedTuple):
    """What is asked of a device."""

    device_kind: str
    compute_capability: str
    platform: str = "gpu"


T4 = Gpu("Tesla T4", "7.5")


@pytest.mark.parametrize(
    ("device", "dtype", "said"),
    [
        (T4, "bfloat16", True),
        (Gpu("Tesla P100-PCIE-16GB", "6.0"), "bfloat16", True),
        (T4, "float16", False),
        (T4, "float32", False),
        (Gpu("NVIDIA A100-SXM4-40GB", "8.0"), "bfloat16", False),
        (Gpu("NVIDIA B200", "10.0"), "bfloat16", False),
        (Gpu("AMD Instinct MI300X", "gfx942"), "bfloat16", False),
        (Gpu("TPU v2", "", "tpu"), "bfloat16", False),
        (jax.devices()[0], "bfloat16", False),
    ],
)
def test_a_gpu_without_bfloat16_is_told_of_float16(device: Any, dtype: str, said: bool) -> None:
    advice = float16_advice(device, jnp.dtype(dtype))
    assert (advice is not None) is said
    if said:
        assert advice is not None
        assert advice.startswith(f"{device.device_kind} has no arithmetic of bfloat16")
        assert "--dtype float16" in advice
        assert "\n" not in advice


@pytest.mark.parametrize(("dtype", "lines"), [(None, 1), ("bfloat16", 0), ("float16", 0)])
def test_float16_is_advised_where_nobody_has_chosen(
    dtype: str | None,
    lines: int,
    friendly_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(
        "jllm_runtime.loading.float16_advice", lambda device, dtype: float16_advice(T4, jnp.bfloat16) or dtype
    )
    loaded = load_model(friendly_checkpoint, dtype=dtype)
    assert len(caplog.records) == lines
    assert loaded.weights.dtype == (dtype or "float32")


@pytest.mark.parametrize("dtype", ["float8", "int8", "fp32", ""])
def test_another_type_is_refused(dtype: str, friendly_checkpoint: Path) -> None:
    with pytest.raises(ModelError, match=f"dtype must be one of float32, bfloat16, float16, got '{dtype}'"):
        load_model(friendly_checkpoint, dtype=dtype)


@pytest.mark.parametrize(
    ("generation", "tokenizer", "eos_ids"),
    [
        (None, {"bos_token": "<|bos|>"}, ()),
        ({"eos_token_id": 7}, {"bos_token": "<|bos|>"}, (7,)),
        (None, {"eos_token": "<|end|>"}, (259,)),
        ({"eos_token_id": 7}, {"eos_token": "<|end|>"}, (7, 259)),
        ({"eos_token_id": [261, 7]}, {"eos_token": "<|end|>"}, (7, 259, 261)),
        ({"eos_token_id": [259]}, {"eos_token": "<|end|>"}, (259,)),
        ({"eos_token_id": 0}, {"bos_token": "<|bos|>"}, (0,)),
        ({"eos_token_id": None}, {"bos_token": "<|bos|>"}, ()),
    ],
)
def test_a_text_ends_where_the_publisher_or_the_tokenizer_says(
    generation: dict[str, Any] | None, tokenizer: dict[str, str], eos_ids: tuple[int, ...], damaged: Path
) -> None:
    (damaged / "generation_config.json").unlink()
    if generation is not None:
        (damaged / "generation_config.json").write_text(json.dumps(generation))
    (damaged / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert load_model(damaged).eos_ids == eos_ids


def test_without_a_tokenizer_a_model_takes_token_ids(damaged: Path) -> None:
    (damaged / "tokenizer.json").unlink()
    model = load_model(damaged)
    assert model.tokenizer is None
    [output] = generate(model, [[ord("H")]], SamplingParams(max_tokens=3))
    assert (output.token_ids, output.text) == (list(b"i, "), "")


# ---- What is refused.


def test_nothing_there(install, tmp_path: Path) -> None:
    install()
    with pytest.raises(ModelError, match=r"there is no model at .*missing.*jllm-convert convert"):
        load_model(tmp_path / "missing")


def test_without_a_converter_another_folder_is_an_invitation_to_install_it(install, tmp_path: Path) -> None:
    install()
    with pytest.raises(ModelError, match=r"not a checkpoint.*pip install jllm-convert"):
        load_model(tmp_path)


def test_a_folder_that_no_resolver_knows(install, tmp_path: Path) -> None:
    install(lambda name: None)
    with pytest.raises(ModelError, match=r"neither a checkpoint, nor a Hugging Face folder, nor a \.gguf file"):
        load_model(tmp_path)


def test_a_name_that_no_resolver_knows(install, tmp_path: Path) -> None:
    install(lambda name: None)
    with pytest.raises(ModelError, match="there is no model at some/name"):
        load_model("some/name")


def test_the_first_resolver_that_knows_a_name_decides(install, friendly_checkpoint: Path) -> None:
    asked = []

    def know_nothing(name: str) -> None:
        asked.append(name)

    def know_it(name: str) -> Path:
        asked.append(name)
        return friendly_checkpoint

    install(know_nothing, know_it, lambda name: pytest.fail("one resolver too many"))
    assert load_model("some/name").path == friendly_checkpoint
    assert asked == ["some/name"] * 2


def test_a_checkpoint_needs_no_resolver(install, friendly_checkpoint: Path) -> None:
    install(lambda name: pytest.fail("asked for what is there"))
    assert resolve_model(str(friendly_checkpoint)) == friendly_checkpoint


def test_a_model_too_large_for_the_machine_is_refused_before_it_is_read(
    friendly_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "restore_weights", lambda *_: pytest.fail("read"))
    monkeypatch.setattr("jllm_runtime.loading.os.sysconf", {"SC_PHYS_PAGES": 8, "SC_PAGE_SIZE": 4096}.get)
    with pytest.raises(ModelError, match=r"the weights need \d+\.\d GiB on each cpu device, \d+\.\d GiB are there"):
        load_model(friendly_checkpoint)


def test_a_model_that_just_fits_is_loaded(friendly_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(array.nbytes for array in jax.tree.leaves(load_model(friendly_checkpoint).weights))
    monkeypatch.setattr("jllm_runtime.loading.os.sysconf", {"SC_PHYS_PAGES": needed, "SC_PAGE_SIZE": 1}.get)
    load_model(friendly_checkpoint, make_mesh(devices=jax.devices()[:1]))
    monkeypatch.setattr("jllm_runtime.loading.os.sysconf", {"SC_PHYS_PAGES": needed - 1, "SC_PAGE_SIZE": 1}.get)
    with pytest.raises(ModelError, match="smaller type"):
        load_model(friendly_checkpoint, make_mesh(devices=jax.devices()[:1]))
    load_model(friendly_checkpoint, make_mesh(devices=jax.devices()[:1]), dtype="bfloat16")


def test_damaged_weights_are_an_error(damaged: Path) -> None:
    largest = max((damaged / "weights").rglob("*"), key=lambda path: path.stat().st_size)
    contents = bytearray(largest.read_bytes())
    contents[len(contents) // 2] ^= 1
    largest.write_bytes(contents)
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(damaged)


@pytest.mark.parametrize(
    ("file", "contents"),
    [
        ("manifest.json", "{"),
        ("manifest.json", '{"format": "other"}'),
        ("manifest.json", '{"format": "jllm-checkpoint", "format_version": 99}'),
        ("generation_config.json", "{"),
        ("generation_config.json", "[]"),
    ],
)
def test_a_damaged_description_is_an_error(file: str, contents: str, damaged: Path) -> None:
    (damaged / file).write_text(contents)
    with pytest.raises(CheckpointError):
        load_model(damaged)


def test_weights_of_another_architecture_are_an_error(damaged: Path) -> None:
    config = json.loads((damaged / "model.json").read_text())
    (damaged / "model.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(CheckpointError, match=r"layers\.2.* is missing"):
        load_model(damaged)
