"""ShardingRules: which part of an array goes where; and the mesh that suits a model."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jllm_core import ArrayInfo, DeltaNetConfig, ModelConfig, MoEConfig, Placement, ShardingRules, abstract_weights
from jllm_core.mesh_axes import ShardingError, default_axes, model_rules, partial_lanes
from jllm_core.recurrent_state import abstract_state
from jllm_core.sharding import PRESETS

MakeConfig = Callable[..., ModelConfig]

Q_AXES = ("model", "heads", "head_dim")


def make_mesh(**sizes: int) -> Mesh:
    """A mesh of that form. Its devices are all the same one: specs are worked out, nothing is placed."""
    shape = tuple(sizes.values())
    devices = np.full(int(np.prod(shape)), jax.devices()[0], dtype=object)
    return Mesh(devices.reshape(shape), tuple(sizes))


@pytest.mark.parametrize(
    ("shape", "axes", "spec"),
    [
        ((16, 8, 4), Q_AXES, P(None, "tensor", None)),
        ((16, 4, 4), ("model", "kv_heads", "head_dim"), P(None, "tensor", None)),
        ((8, 4, 16), ("heads", "head_dim", "model"), P("tensor", None, None)),
        ((16, 12), ("model", "ffw"), P(None, "tensor")),
        ((12, 16), ("ffw", "model"), P("tensor", None)),
        ((12, 16), ("vocab", "model"), P("tensor", None)),
        ((16,), ("model",), P(None)),
        ((2, 6, 16), ("batch", "sequence", "model"), P("data", None, None)),
        ((2, 6, 4), ("batch", None, "kv_heads"), P("data", None, "tensor")),
        ((), (), P()),
    ],
)
def test_defaults_are_tensor_parallel(shape: tuple[int, ...], axes: tuple[str | None, ...], spec: P) -> None:
    assert ShardingRules().partition_spec(shape, axes, make_mesh(data=2, tensor=4)) == spec


@pytest.mark.parametrize(("heads", "expected"), [(3, None), (2, None), (4, "tensor"), (8, "tensor"), (9, None)])
def test_an_axis_that_the_devices_do_not_divide_stays_whole(heads: int, expected: str | None) -> None:
    mesh = make_mesh(data=1, tensor=4)
    assert ShardingRules().partition_spec((16, heads, 4), Q_AXES, mesh) == P(None, expected, None)


def test_a_mesh_axis_of_one_device_splits_nothing() -> None:
    assert ShardingRules().partition_spec((16, 8, 4), Q_AXES, make_mesh(data=4, tensor=1)) == P(None, None, None)


def test_a_mesh_without_the_axis_leaves_it_whole() -> None:
    assert ShardingRules().partition_spec((2, 8, 4), ("batch", "heads", "head_dim"), make_mesh(data=2)) == P(
        "data", None, None
    )


def test_one_axis_may_go_over_several_mesh_axes() -> None:
    rules, mesh = ShardingRules(ffw=("data", "tensor")), make_mesh(data=2, tensor=4)
    assert rules.partition_spec((16, 24), ("model", "ffw"), mesh) == P(None, ("data", "tensor"))
    # 8 devices do not divide 12, the 4 of the last axis do; nothing divides 9.
    assert rules.partition_spec((16, 12), ("model", "ffw"), mesh) == P(None, "tensor")
    assert rules.partition_spec((16, 9), ("model", "ffw"), mesh) == P(None, None)
    assert rules.partition_spec((16, 12), ("model", "ffw"), make_mesh(tensor=4)) == P(None, "tensor")


@pytest.mark.parametrize(
    ("sizes", "split"), [({"expert": 8, "tensor": 1}, "expert"), ({"expert": 4, "tensor": 2}, ("expert", "tensor"))]
)
def test_a_mesh_for_experts_splits_heads_and_vocabulary_too(sizes: dict[str, int], split: object) -> None:
    mesh = make_mesh(**sizes)
    assert ShardingRules().partition_spec((16, 8, 4), Q_AXES, mesh) == P(None, split, None)
    assert ShardingRules().partition_spec((64, 16), ("vocab", "model"), mesh) == P(split, None)
    # 12 heads are still shared out over tensor, as by a rule of that axis alone.
    assert ShardingRules().partition_spec((16, 12, 4), Q_AXES, make_mesh(expert=4, tensor=2)) == P(None, "tensor", None)
    placement = Placement(mesh)
    assert placement.kv_copies(heads=32, kv_heads=4) == 2
    # The copies go where the query heads are.
    assert placement.spec((2, 8, 64, 4), "batch", "kv_heads", "sequence", None) == P(None, split, None, None)


def test_an_axis_without_a_rule_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"no sharding rule for the logical axis 'colour'.*known: batch,.*ffw, experts"
    ):
        ShardingRules().partition_spec((8, 16), ("colour", "model"), make_mesh(tensor=4))


def test_two_axes_on_one_mesh_axis_are_an_error() -> None:
    rules, mesh = ShardingRules(model="tensor"), make_mesh(data=2, tensor=4)
    with pytest.raises(ValueError, match=r"'heads'.*already splits another axis.*change one of the two rules"):
        rules.partition_spec((16, 8, 4), Q_AXES, mesh)
    with pytest.raises(ValueError, match="already splits another axis"):
        ShardingRules(model=("data", "tensor")).partition_spec((16, 8, 4), Q_AXES, mesh)


def test_two_axes_on_one_mesh_axis_are_fine_where_one_of_them_stays_whole() -> None:
    rules, mesh = ShardingRules(model="tensor"), make_mesh(data=2, tensor=4)
    assert rules.partition_spec((16, 3, 4), Q_AXES, mesh) == P("tensor", None, None)


def test_axes_that_do_not_fit_the_shape_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        ShardingRules().partition_spec((16, 8), Q_AXES, make_mesh(tensor=4))


def test_a_tree_of_array_infos_becomes_a_tree_of_shardings() -> None:
    mesh = make_mesh(data=2, tensor=4)
    tree = {"q": ArrayInfo((16, 8, 4), np.float32, Q_AXES), "gamma": ArrayInfo((16,), np.float32, ("model",))}
    assert ShardingRules().tree_shardings(tree, mesh) == {
        "q": NamedSharding(mesh, P(None, "tensor", None)),
        "gamma": NamedSharding(mesh, P(None)),
    }


def test_a_placement_needs_no_devices_to_say_where_an_array_goes() -> None:
    mesh = AbstractMesh((2, 4), ("data", "tensor"))
    placement = Placement(mesh)
    assert placement.spec((8, 5, 16), "batch", "sequence", "ffw") == P("data", None, "tensor")
    assert hash(placement) == hash(Placement(AbstractMesh((2, 4), ("data", "tensor"))))
    info = ArrayInfo((8, 16), np.float32, ("batch", "ffw"))
    assert placement.rules.sharding(info, mesh).shard_shape((8, 16)) == (4, 4)


# ---- Placement and presets


@pytest.mark.parametrize(
    ("tensor", "heads", "kv_heads", "copies"),
    [(1, 8, 2, 1), (2, 8, 2, 1), (8, 8, 2, 4), (8, 16, 4, 2), (8, 9, 3, 1), (4, 12, 3, 1), (8, 8, 8, 1)],
)
def test_kv_heads_are_copied_where_devices_outnumber_them(tensor: int, heads: int, kv_heads: int, copies: int) -> None:
    placement = Placement(AbstractMesh((1, tensor), ("data", "tensor")))
    assert placement.kv_copies(heads, kv_heads) == copies
    if copies > 1:
        assert placement.axes_of("kv_heads", kv_heads * copies) == ("tensor",)


def test_presets_say_where_weights_and_activations_go() -> None:
    mesh = AbstractMesh((2, 2, 2), ("data", "expert", "tensor"))
    q = ((16, 8, 4), ("model", "heads", "head_dim"))
    experts = ((4, 16, 8), ("experts", "model", "ffw"))
    stream = ((2, 64, 16), ("batch", "tokens", None))
    specs = {name: [rules.partition_spec(*of, mesh) for of in (q, experts, stream)] for name, rules in PRESETS.items()}
    both = ("expert", "tensor")
    tensor = [P(None, both, None), P("expert", None, "tensor"), P("data", None, None)]
    assert specs["tensor"] == specs["data-tensor"] == specs["expert-tensor"] == tensor
    assert specs["fsdp"] == [P("data", both, None), P("expert", "data", "tensor"), P("data", None, None)]
    assert specs["sequence"] == [*tensor[:2], P("data", "tensor", None)]


# ---- Axes of a mesh that nobody names.

TREE = {"w": ArrayInfo((16, 12), np.float32, ("model", "ffw"))}


@pytest.mark.parametrize("sizes", [{"model": 4}, {"data": 2, "tp": 4}, {"tensor": 2, "dp": 2, "tp": 2}])
def test_a_mesh_axis_that_no_rule_names_is_refused_by_name(sizes: dict[str, int]) -> None:
    unknown = [name for name in sizes if name not in ("data", "expert", "tensor")]
    with pytest.raises(
        ShardingError, match=f"names the mesh axis {', '.join(map(repr, unknown))}, .*heads='{unknown[0]}'"
    ):
        ShardingRules().tree_shardings(TREE, make_mesh(**sizes))
    # Callers that caught the ValueErrors of rules catch this as well.
    assert issubclass(ShardingError, ValueError)


@pytest.mark.parametrize(
    ("rules", "sizes"),
    [
        (ShardingRules(), {"data": 2, "tensor": 4}),
        (ShardingRules(), {"tensor": 4}),
        (ShardingRules(), {"model": 1, "tensor": 4}),  # one device: nothing is computed twice
        (ShardingRules(ffw="model"), {"model": 4}),
        (ShardingRules(batch=("data", "replica")), {"replica": 2, "tensor": 2}),
        (ShardingRules(experts=None), {"expert": 2, "tensor": 2}),  # a known axis that is left out on purpose
    ],
)
def test_a_mesh_whose_axes_are_known_or_named_is_taken(rules: ShardingRules, sizes: dict[str, int]) -> None:
    assert rules.tree_shardings(TREE, make_mesh(**sizes))["w"].mesh.shape == sizes


# ---- The mesh for a model.

MIXTURE = MoEConfig(num_experts=128, experts_per_token=8, intermediate_size=768)


@pytest.mark.parametrize(
    ("moe", "devices", "axes"),
    [
        (None, 8, {"tensor": 8}),
        (MIXTURE, 8, {"expert": 8, "tensor": 1}),
        (MIXTURE, 1, {"expert": 1, "tensor": 1}),
        (MIXTURE, 6, {"expert": 2, "tensor": 3}),  # experts of 256 columns
        (MIXTURE, 64, {"expert": 64, "tensor": 1}),
        (replace(MIXTURE, num_experts=60, intermediate_size=1408), 8, {"expert": 4, "tensor": 2}),
        (replace(MIXTURE, num_experts=9), 8, {"expert": 1, "tensor": 8}),
    ],
)
def test_the_mesh_of_a_model_goes_by_its_shape(
    moe: MoEConfig | None, devices: int, axes: dict[str, int], make_config: MakeConfig
) -> None:
    assert default_axes(make_config(moe=moe), devices) == axes


def test_rules_that_split_no_experts_have_no_axis_for_them(make_config: MakeConfig) -> None:
    config = make_config(moe=MIXTURE)
    for rules in (ShardingRules(experts=None), ShardingRules(experts="tensor", ffw=None)):
        assert default_axes(config, 8, rules) == {"tensor": 8}


def on_tpus(**sizes: int) -> Placement:
    device = NamedTuple("Device", [("device_kind", str)])("TPU v5 lite")
    return Placement(AbstractMesh(tuple(sizes.values()), tuple(sizes), abstract_device=device))


def test_experts_that_are_cut_across_lanes_are_told_with_a_mesh_that_cuts_none(make_config: MakeConfig) -> None:
    config = make_config(moe=MIXTURE)
    told = partial_lanes(config, on_tpus(expert=1, tensor=8))
    assert told is not None
    for part in ("'tensor': 8", "96 of the 768 columns", "128 lanes", "The mesh expert=8, the default"):
        assert part in told
    assert partial_lanes(config, on_tpus(expert=2, tensor=4)) is not None  # 192 wide
    for quiet in (on_tpus(expert=4, tensor=2), on_tpus(expert=8), Placement(make_mesh(tensor=8))):
        assert partial_lanes(config, quiet) is None
    assert partial_lanes(make_config(), on_tpus(tensor=8)) is None
    # No mesh makes whole lanes of these.
    assert partial_lanes(make_config(moe=replace(MIXTURE, intermediate_size=96)), on_tpus(tensor=8)) is None


@pytest.mark.parametrize(
    ("mesh", "heads", "rules", "split"),
    [
        ({"tensor": 4}, (4, 8), ShardingRules(), ("tensor",)),
        # The mesh divides the value heads alone.
        ({"tensor": 8}, (4, 8), ShardingRules(), ()),
        ({"expert": 4, "tensor": 2}, (4, 8), ShardingRules(), ("tensor",)),
        ({"expert": 4, "tensor": 2}, (8, 16), ShardingRules(), ("expert", "tensor")),
        ({"data": 2, "tensor": 4}, (1, 4), PRESETS["fsdp"], ()),
        # Rules that split one of the two.
        ({"tensor": 4}, (4, 8), ShardingRules(value_heads=None), ()),
        ({"tensor": 4}, (4, 8), ShardingRules(key_heads=None), ()),
    ],
)
def test_key_and_value_heads_are_split_together_or_not_at_all(
    mesh: dict[str, int], heads: tuple[int, int], rules: ShardingRules, split: tuple[str, ...], make_config: MakeConfig
) -> None:
    net = DeltaNetConfig(num_key_heads=heads[0], num_value_heads=heads[1], key_head_dim=8, value_head_dim=4)
    config = make_config(mixers=("delta_net",) * make_config().num_layers, delta_net=net)
    devices = make_mesh(**mesh)
    fitted = model_rules(config, devices, rules)
    found = set()
    for info in jax.tree.leaves([abstract_weights(config).layers, abstract_state(net, 8)]):
        for axis, size in zip(info.logical_axes, info.shape, strict=True):
            if axis in ("key_heads", "value_heads"):
                found.add((axis, fitted.axes_of(axis, size, devices)))
    assert found == {("key_heads", split), ("value_heads", split)}


def test_rules_that_fit_are_left_as_they_are(make_config: MakeConfig) -> None:
    assert model_rules(make_config(), make_mesh(tensor=8)) == ShardingRules()
