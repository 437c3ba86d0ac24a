"""The device mesh. Layouts over several devices are made in a process of their own, which has eight of them."""

import jax
import pytest
from jllm_runtime import make_mesh
from jllm_runtime.errors import MeshError
from jllm_runtime.mesh import parse_mesh

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
        ({"data": 2, "tensor": 3}, ["'data': 2", "'tensor': 3", "needs 6 devices", "there are 1"]),
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
