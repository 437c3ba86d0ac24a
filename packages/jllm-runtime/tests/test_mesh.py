"""The device mesh. Layouts over several devices are made in a process of their own, which has eight of them."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jllm_runtime import load_model, make_mesh
from jllm_runtime.errors import MeshError
from jllm_runtime.mesh import abstract_mesh, automatic_mesh, make_cpu_devices, parse_mesh

LAYOUT = """
import jax
from jllm_runtime import make_mesh
mesh = make_mesh({shape})
print(dict(mesh.shape), [[device.id for device in row.flat] for row in mesh.devices])
"""


def test_the_default_puts_every_device_on_the_tensor_axis() -> None:
    assert dict(make_mesh().shape) == {"data": 1, "expert": 1, "tensor": len(jax.devices())}


@pytest.mark.parametrize("shape", [{}, {"data": 1}, {"tensor": 1}, {"tensor": 1, "data": 1}])
def test_an_axis_that_is_left_out_has_one_device(shape: dict[str, int]) -> None:
    assert dict(make_mesh(shape, jax.devices()[:1]).shape) == {"data": 1, "expert": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (None, "{'data': 1, 'expert': 1, 'tensor': 8} [[0, 1, 2, 3, 4, 5, 6, 7]]"),
        ({"data": 2, "tensor": 4}, "{'data': 2, 'expert': 1, 'tensor': 4} [[0, 1, 2, 3], [4, 5, 6, 7]]"),
        ({"tensor": 2, "data": 4}, "{'data': 4, 'expert': 1, 'tensor': 2} [[0, 1], [2, 3], [4, 5], [6, 7]]"),
        (
            {"data": 2, "expert": 2, "tensor": 2},
            "{'data': 2, 'expert': 2, 'tensor': 2} [[0, 1, 2, 3], [4, 5, 6, 7]]",
        ),
        ({"data": 8}, "{'data': 8, 'expert': 1, 'tensor': 1} [[0], [1], [2], [3], [4], [5], [6], [7]]"),
    ],
)
def test_neighbouring_devices_share_a_tensor_axis(shape: dict[str, int] | None, expected: str, run_python) -> None:
    assert run_python(LAYOUT.format(shape=shape), devices=8).strip() == expected


def test_a_mesh_of_some_devices_leaves_the_others_alone(run_python) -> None:
    code = LAYOUT.format(shape='{"data": 2}, jax.devices()[2:4]')
    assert run_python(code, devices=8).strip() == "{'data': 2, 'expert': 1, 'tensor': 1} [[2], [3]]"


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ({"model": 1}, ["unknown mesh axes ['model']", "data", "tensor"]),
        ({"tensor": 1, "z": 1, "a": 1}, ["['a', 'z']"]),
        ({"data": 0}, ["at least one device", "{'data': 0}"]),
        ({"data": -1, "tensor": -1}, ["at least one device", "-1"]),
        (
            {"data": 2, "tensor": 3},
            [
                *("'data': 2", "'tensor': 3", "needs 6 devices", "there are 1 (cpu)", "--devices 6"),
                *("XLA_FLAGS=--xla_force_host_platform_device_count=6", "jax_num_cpu_devices"),
            ],
        ),
    ],
)
def test_an_impossible_shape_is_refused_with_the_numbers(shape: dict[str, int], parts: list[str]) -> None:
    with pytest.raises(MeshError) as caught:
        make_mesh(shape, jax.devices()[:1])
    for part in parts:
        assert part in str(caught.value)


def test_no_devices_make_no_mesh() -> None:
    with pytest.raises(MeshError, match="at least one device, got none"):
        make_mesh(devices=[])


@pytest.mark.parametrize("text", ["", "data", "data=", "data=two", "data=2,data=4", "data=2 tensor=4", "data=-1"])
def test_a_mesh_in_words_is_axes_and_devices(text: str) -> None:
    assert parse_mesh("data=2, tensor=4") == {"data": 2, "tensor": 4}
    with pytest.raises(MeshError, match=r"such as data=2,tensor=4, got"):
        parse_mesh(text)


def test_elsewhere_the_advice_is_a_mesh_that_fits() -> None:
    with pytest.raises(MeshError) as caught:
        abstract_mesh({"tensor": 3}, 8)
    assert str(caught.value).endswith(
        "there are 8; the sizes multiply to the number of devices, such as tensor=8 or data=2,tensor=4"
    )


# ---- Devices of the CPU, and meshes that somebody else made.

SEEN = """
import jax
from jllm_runtime.mesh import make_cpu_devices
make_cpu_devices(4)
print(len(jax.devices()), jax.devices()[0].platform)
"""


def test_the_cpu_is_seen_as_several_devices(run_python) -> None:
    assert run_python(SEEN, devices=2).strip() == "4 cpu"


def test_after_jax_has_started_it_is_too_late() -> None:
    jax.devices()
    with pytest.raises(MeshError, match=r"JAX has started\. .*XLA_FLAGS=--xla_force_host_platform_device_count=3"):
        make_cpu_devices(3)


@pytest.mark.parametrize("count", [0, -1, 1025])
def test_an_impossible_number_of_devices_is_refused(count: int) -> None:
    with pytest.raises(MeshError, match=f"1 to 1,024 devices, got {count}"):
        make_cpu_devices(count)


OTHER_MESHES = """
import jax, numpy as np, sys
from jax.sharding import AxisType, Mesh
from jllm_runtime import SamplingParams, generate, load_model, make_mesh
devices = np.array(jax.devices())
meshes = [
    make_mesh({"tensor": 4}),
    Mesh(devices, ("tensor",)),
    Mesh(devices.reshape(2, 2, 1), ("tensor", "data", "whatever")),
    Mesh(devices, ("tensor",), axis_types=(AxisType.Explicit,)),
]
for mesh in meshes:
    model = load_model(%r, mesh)
    tokens = generate(model, [[1, 2, 3], [4, 5]], SamplingParams(max_tokens=4))
    print([each.token_ids for each in tokens], model.weights.embedding.sharding.num_devices)
"""


def test_a_mesh_with_some_of_the_axes_runs(run_python, friendly_checkpoint) -> None:
    """Also one of ``jax.make_mesh``, whose axes are explicit: the programs leave the shardings between to XLA."""
    lines = run_python(OTHER_MESHES % str(friendly_checkpoint), devices=4).splitlines()
    assert len(lines) == 4
    assert len(set(lines)) == 1
    assert lines[0].endswith("4")


def test_a_mesh_of_automatic_axes_is_taken_as_it_is() -> None:
    mesh = make_mesh(None, jax.devices()[:1])
    assert automatic_mesh(mesh) is mesh
    explicit = Mesh(np.array(jax.devices()[:1]), ("tensor",), axis_types=(AxisType.Explicit,))
    assert automatic_mesh(explicit) == Mesh(np.array(jax.devices()[:1]), ("tensor",))


UNKNOWN = """
import jax, numpy as np
from jax.sharding import Mesh
from jllm_core import ShardingRules
from jllm_core.errors import JLLMError
from jllm_runtime import load_model
mesh = Mesh(np.array(jax.devices()), ("model",))
try:
    load_model(%r, mesh)
except JLLMError as error:
    print(error)
rules = ShardingRules(ffw="model", vocab="model")
print(load_model(%r, mesh, rules=rules).weights.layers[0].ffw.w_up.sharding.spec)
"""


def test_a_mesh_axis_that_nobody_knows_is_refused(run_python, friendly_checkpoint) -> None:
    folder = str(friendly_checkpoint)
    refused, split = run_python(UNKNOWN % (folder, folder), devices=2).splitlines()
    assert "no sharding rule names the mesh axis 'model'" in refused
    assert "Call the axes data, expert, tensor" in refused
    assert "ShardingRules(heads='model'" in refused
    assert "model" in split


def test_on_one_device_the_name_of_an_axis_does_not_matter(friendly_checkpoint) -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    assert load_model(friendly_checkpoint, mesh).mesh == mesh
