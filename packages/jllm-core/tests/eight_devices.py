"""Tests on a mesh of eight CPU devices; test_multi_device.py runs them in a process that has so many."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jllm_core import (
    ArrayInfo,
    DeltaNetConfig,
    ModelConfig,
    MoEConfig,
    MoELayer,
    Placement,
    Quantization,
    ShardingRules,
    Weights,
    abstract_weights,
    forward,
    init_weights,
)
from jllm_core.array_info import init_arrays, named_leaves
from jllm_core.backends.base import XLA, Backend
from jllm_core.backends.gpu.backend import GPU
from jllm_core.backends.tpu.backend import TPU
from jllm_core.backends.tpu.paged_attention import POOL_AXES
from jllm_core.checkpoint import restore_weights
from jllm_core.kv_cache import PagedSlots
from jllm_core.ops.attention import attention
from jllm_core.ops.moe import moe
from jllm_core.ops.sampling import thresholds
from jllm_core.quantization.device_form import held_weights
from jllm_core.quantization.keys_values import QuantizedSlots, quantize_slots

MakeConfig = Callable[..., ModelConfig]
MakeWeights = Callable[..., Weights]
SaveModel = Callable[[Path, ModelConfig, Weights], Path]


def make_mesh(data: int, tensor: int) -> Mesh:
    return jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def config(make_config: MakeConfig) -> ModelConfig:
    # Eight devices share the query heads and the feed-forward layer, but neither the kv heads nor the vocabulary.
    return make_config(num_heads=8, num_kv_heads=2, intermediate_size=16, num_layers=1, qk_norm=True)


def assert_same_numbers(got: Any, expected: Any) -> None:
    for name, array in named_leaves(expected).items():
        np.testing.assert_array_equal(np.asarray(named_leaves(got)[name]), np.asarray(array), err_msg=name)


def test_there_are_eight_devices() -> None:
    assert jax.device_count() == 8


def test_random_weights_are_the_same_on_every_mesh_and_made_in_their_place(make_config: MakeConfig) -> None:
    # Few shapes: each is a program to compile.
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_heads": 8, "head_dim": 8}
    config = make_config(**sizes, num_layers=1, tie_embeddings=True)
    key = jax.random.key(3)
    on_one, mesh = init_weights(config, key), make_mesh(1, 8)
    on_eight = init_weights(config, key, mesh=mesh)
    assert_same_numbers(on_eight, on_one)
    attn, ffw = on_eight.layers[0].attn, on_eight.layers[0].ffw
    assert attn.q.sharding == NamedSharding(mesh, P(None, "tensor", None))
    assert {shard.data.shape for shard in attn.q.addressable_shards} == {(8, 1, 8)}
    assert attn.k.is_fully_replicated  # 2 kv heads on 8 devices
    assert {shard.data.shape for shard in ffw.w_down.addressable_shards} == {(1, 8)}
    assert len(on_one.layers[0].attn.q.devices()) == 1


@pytest.mark.parametrize(("data", "tensor", "queries"), [(1, 8, 1), (2, 4, 1), (2, 4, 8)])
def test_each_device_attends_to_the_pages_of_its_own_heads(data: int, tensor: int, queries: int) -> None:
    """By the kernel for TPUs, interpreted; on 8 devices each of 4 kv heads is kept twice."""
    placement = Placement(make_mesh(data, tensor))
    heads, kv_heads, size, pages = 16, 4 * placement.kv_copies(16, 4), 8, 7
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, queries, heads, 16)), jnp.float32)
    # Copies stand beside one another.
    pools = [np.repeat(rng.standard_normal((pages, 4, size, 16)), kv_heads // 4, axis=1) for _ in "kv"]
    tables = jnp.array([[3, 0, 6, pages], [5, pages, pages, pages]], jnp.int32)
    keys, values = (PagedSlots(jnp.asarray(pool, jnp.float32), tables) for pool in pools)
    positions = jnp.array([[16], [0]]) + jnp.arange(queries)
    expected = attention(q, keys, values, positions)

    @jax.jit
    def attend(q: jax.Array, keys: PagedSlots, values: PagedSlots) -> jax.Array:
        split = lambda slots: PagedSlots(placement.constrain(slots.pages, *POOL_AXES), slots.tables)  # noqa: E731
        return TPU(placement, interpret=True).attention(q, split(keys), split(values), positions)

    np.testing.assert_allclose(attend(q, keys, values), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("mesh_shape", "rules"), [((4, 2), ShardingRules()), ((2, 4), ShardingRules(heads="data", model="tensor"))]
)
def test_random_arrays_do_not_depend_on_rules_or_mesh(mesh_shape: tuple[int, int], rules: ShardingRules) -> None:
    uniform = jax.nn.initializers.uniform(1.0)
    tree = {"q": ArrayInfo((8, 8, 2), np.float32, ("model", "heads", "head_dim"), uniform)}
    key = jax.random.key(0)
    placed = init_arrays(tree, key, rules.tree_shardings(tree, make_mesh(*mesh_shape)))
    assert len(placed["q"].sharding.device_set) == 8
    assert_same_numbers(placed, init_arrays(tree, key))


def test_own_rules_place_the_weights(config: ModelConfig) -> None:
    tree = abstract_weights(config)
    shardings = ShardingRules(ffw=("data", "tensor"), heads=None).tree_shardings(tree, make_mesh(2, 4))
    assert shardings.layers[0].ffw.w_up.spec == P(None, ("data", "tensor"))
    assert shardings.layers[0].ffw.w_up.shard_shape((12, 16)) == (12, 2)
    assert shardings.layers[0].attn.q.spec == P(None, None, None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("data", "tensor"), [(1, 8), (2, 4)])
def test_a_checkpoint_is_restored_into_its_shardings(
    tmp_path: Path,
    config: ModelConfig,
    make_weights: MakeWeights,
    save_model: SaveModel,
    data: int,
    tensor: int,
    dtype: str,
) -> None:
    weights = make_weights(config)
    folder = save_model(tmp_path / "model", config, weights)
    shardings = ShardingRules().tree_shardings(abstract_weights(config), make_mesh(data, tensor))
    restored = restore_weights(folder, config, dtype, shardings)
    assert jax.tree.map(lambda array: array.sharding, restored) == shardings
    expected = jax.tree.map(lambda array: np.asarray(array).astype(jnp.dtype(dtype)), weights)
    assert_same_numbers(restored, expected)
    q = restored.layers[0].attn.q
    assert {shard.data.shape for shard in q.addressable_shards} == {(12, 8 // tensor, 4)}


def test_arrays_cut_into_chunks_are_restored_across_the_cuts(
    tmp_path: Path, make_config: MakeConfig, save_model: SaveModel
) -> None:
    config = make_config(vocab_size=4100, hidden_size=128, num_layers=1, tie_embeddings=True)
    rows = np.arange(4100 * 128, dtype=np.float32).reshape(4100, 128)
    assert rows.nbytes > 1 << 20  # cut into chunks of 513 rows; four devices hold 1025 each
    arrays = {name: np.zeros(info.shape, np.float32) for name, info in named_leaves(abstract_weights(config)).items()}
    arrays["embedding"] = rows
    tree = jax.tree.unflatten(jax.tree.structure(abstract_weights(config)), list(arrays.values()))
    folder = save_model(tmp_path / "model", config, tree)
    shardings = ShardingRules().tree_shardings(abstract_weights(config), make_mesh(2, 4))
    embedding = restore_weights(folder, config, None, shardings).embedding
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(1025, 128)}
    np.testing.assert_array_equal(np.asarray(embedding), rows)


def test_without_shardings_a_checkpoint_goes_to_one_device(
    tmp_path: Path, config: ModelConfig, make_weights: MakeWeights, save_model: SaveModel
) -> None:
    weights = make_weights(config)
    restored = restore_weights(save_model(tmp_path / "model", config, weights), config)
    assert {array.sharding for array in jax.tree.leaves(restored)} == {SingleDeviceSharding(jax.devices()[0])}


@pytest.mark.parametrize(("data", "tensor"), [(1, 8), (2, 4)])
def test_logits_are_the_same_on_a_mesh(config: ModelConfig, make_weights: MakeWeights, data: int, tensor: int) -> None:
    weights, mesh = make_weights(config), make_mesh(data, tensor)
    tokens = jnp.array([[1, 5, 2], [3, 0, 12]])
    positions = jnp.array([[0, 1, 2], [0, 1, 2]])
    run = jax.jit(forward, static_argnames="config")
    alone, _ = run(tokens, positions, weights, config=config)
    placed = jax.device_put(weights, ShardingRules().tree_shardings(abstract_weights(config), mesh))
    batch = NamedSharding(mesh, P("data"))
    together, _ = run(jax.device_put(tokens, batch), jax.device_put(positions, batch), placed, config=config)
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_logits_of_a_quantised_embedding_are_the_same_on_a_mesh(make_config: MakeConfig) -> None:
    config = make_config(vocab_size=16, num_heads=8, num_layers=1, tie_embeddings=True)
    quantization, mesh = Quantization(8, embedding=8), make_mesh(1, 8)
    weights = init_weights(config, jax.random.key(0), quantization=quantization)
    placed = init_weights(config, jax.random.key(0), mesh=mesh, quantization=quantization)
    parts = placed.embedding
    assert {shard.data.shape for part in (parts.values, parts.scales) for shard in part.addressable_shards} == {
        (2, config.hidden_size),
        (2, 1),
    }
    tokens, positions = jnp.array([[1, 5, 2], [3, 0, 12]]), jnp.arange(3)[None].repeat(2, 0)
    run = jax.jit(forward, static_argnames="config")
    alone, _ = run(tokens, positions, weights, config=config)
    together, _ = run(tokens, positions, placed, config=config)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4 * np.abs(alone).max())


# ---- Mixtures of experts

MIXTURE = MoEConfig(num_experts=8, experts_per_token=3, intermediate_size=8)
SHARED = MoEConfig(**{**vars(MIXTURE), "shared_size": 16, "shared_gate": True})
MESHES = [
    {"expert": 8},
    {"expert": 2, "tensor": 4},
    {"expert": 4, "tensor": 2},
    {"data": 2, "expert": 4},
    {"tensor": 8},
]


@partial(jax.jit, static_argnums=(2, 3))
def run_moe(x: jax.Array, layer: MoELayer, config: MoEConfig, backend: Backend) -> jax.Array:
    return (backend.moe or moe)(x, layer, config, backend)


def place(mixture: MoEConfig, mesh: dict[str, int], make_config: MakeConfig, make_weights: MakeWeights) -> Any:
    """A mixture on one device, the same on this mesh, and the placement."""
    config = make_config(num_layers=1, moe=mixture)
    sizes = tuple(mesh.get(axis, 1) for axis in ("data", "expert", "tensor"))
    placement = Placement(jax.make_mesh(sizes, ("data", "expert", "tensor"), axis_types=(AxisType.Auto,) * 3))
    layer = make_weights(config).layers[0].ffw
    shardings = placement.rules.tree_shardings(abstract_weights(config).layers[0].ffw, placement.mesh)
    return layer, jax.device_put(layer, shardings), placement


def activations(rows: int) -> jax.Array:
    return jax.random.normal(jax.random.key(5), (rows, 16, 12))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("mixture", [MIXTURE, SHARED], ids=["experts", "shared"])
def test_experts_are_shared_out_and_one_sum_joins_them(
    make_config: MakeConfig, make_weights: MakeWeights, mesh: dict[str, int], mixture: MoEConfig
) -> None:
    layer, placed, placement = place(mixture, mesh, make_config, make_weights)
    if mixture.shared_size:
        parts = math.prod(size for axis, size in mesh.items() if axis != "data")
        assert {shard.data.shape for shard in placed.shared.w_down.addressable_shards} == {(16 // parts, 12)}
    shape = 8 // mesh.get("expert", 1), 12, 8 // mesh.get("tensor", 1)
    assert {shard.data.shape for shard in placed.we_up.addressable_shards} == {shape}
    x = placement.constrain(activations(2), "batch", None, None)
    compiled = run_moe.lower(x, placed, mixture, XLA(placement)).compile()
    np.testing.assert_allclose(compiled(x, placed), run_moe(activations(2), layer, mixture, XLA()), atol=1e-5)
    program = compiled.as_text()
    assert program.count(" all-reduce(") + program.count(" all-reduce-start(") == 1
    assert not any(word in program for word in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("shared", [None, 5, 8, 12])
def test_experts_and_widths_that_do_not_divide_are_replicated(
    make_config: MakeConfig, make_weights: MakeWeights, shared: int | None
) -> None:
    """And are counted once, also where the width of a shared expert is divided by more of the devices, or by fewer."""
    mixture = MoEConfig(num_experts=3, experts_per_token=2, intermediate_size=6, shared_size=shared)
    layer, placed, placement = place(mixture, {"expert": 2, "tensor": 4}, make_config, make_weights)
    assert placed.we_gate.is_fully_replicated
    x = activations(1)
    np.testing.assert_allclose(
        run_moe(x, placed, mixture, XLA(placement)), run_moe(x, layer, mixture, XLA()), atol=1e-5
    )


def test_gradients_are_the_same_on_a_mesh(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    mesh = {"data": 2, "expert": 2, "tensor": 2}
    layer, placed, placement = place(SHARED, mesh, make_config, make_weights)

    def loss(layer: MoELayer, backend: Backend) -> jax.Array:
        return jnp.sum(run_moe(activations(2), layer, SHARED, backend) ** 2)

    slope = jax.jit(jax.grad(loss), static_argnums=1)
    expected = slope(layer, XLA())
    got = slope(placed, XLA(placement))
    slopes = named_leaves(got)
    assert len(slopes) == 8
    for name, array in named_leaves(expected).items():
        size = float(jnp.abs(array).max())
        np.testing.assert_allclose(slopes[name] / size, array / size, atol=1e-5, err_msg=name)


def test_logits_of_a_mixture_are_the_same_on_a_mesh(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = make_config(num_layers=2, moe=MoEConfig(**{**vars(MIXTURE), "layers": (False, True)}))
    mesh = jax.make_mesh((2, 2, 2), ("data", "expert", "tensor"), axis_types=(AxisType.Auto,) * 3)
    weights, placement = make_weights(config), Placement(mesh)
    tokens, positions = jnp.array([[1, 5, 2], [3, 0, 12]]), jnp.array([[0, 1, 2], [0, 1, 2]])
    run = jax.jit(forward, static_argnames=("config", "placement"))
    alone, _ = run(tokens, positions, weights, config=config)
    placed = jax.device_put(weights, placement.rules.tree_shardings(abstract_weights(config), mesh))
    together, _ = run(tokens, positions, placed, config=config, placement=placement)
    np.testing.assert_allclose(together, alone, atol=1e-4)


# ---- Delta nets

HYBRID = {
    "num_layers": 2,
    "mixers": ("delta_net", "attention"),
    "rotary_dim": 2,
    "output_gate": True,
    "centered_norm": True,
    "qk_norm": True,
}


@pytest.mark.parametrize("mesh", [{"tensor": 8}, {"data": 2, "tensor": 4}, {"expert": 2, "tensor": 4}], ids=str)
@pytest.mark.parametrize("heads", [(4, 8), (8, 8), (3, 6)], ids=str)
def test_logits_of_a_hybrid_are_the_same_on_a_mesh(
    make_config: MakeConfig, make_weights: MakeWeights, mesh: dict[str, int], heads: tuple[int, int]
) -> None:
    net = DeltaNetConfig(num_key_heads=heads[0], num_value_heads=heads[1], key_head_dim=4, value_head_dim=6)
    config = make_config(**HYBRID, num_heads=8, delta_net=net)
    sizes = tuple(mesh.get(axis, 1) for axis in ("data", "expert", "tensor"))
    devices = jax.make_mesh(sizes, ("data", "expert", "tensor"), axis_types=(AxisType.Auto,) * 3)
    weights, placement = make_weights(config), Placement(devices)
    tokens = jax.random.randint(jax.random.key(0), (2, 70), 0, 13)
    positions = jnp.broadcast_to(jnp.arange(70), tokens.shape)
    run = jax.jit(forward, static_argnames=("config", "placement"))
    alone, _ = run(tokens, positions, weights, config=config)
    placed = jax.device_put(weights, placement.rules.tree_shardings(abstract_weights(config), devices))
    if heads == (8, 8) and mesh == {"tensor": 8}:
        assert {shard.data.shape for shard in placed.layers[0].attn.v.addressable_shards} == {(12, 1, 6)}
    together, _ = run(tokens, positions, placed, config=config, placement=placement)
    np.testing.assert_allclose(together, alone, atol=1e-4)


# ---- Sampling over a split vocabulary.


@pytest.mark.parametrize(
    ("mesh", "vocabulary"),
    [
        ({"tensor": 8}, 1024),
        ({"expert": 4, "tensor": 2}, 8 * 37),  # fewer tokens on a device than candidates
        ({"data": 2, "tensor": 4}, 1024),
        ({"tensor": 8}, 1001),  # whole on each device
    ],
    ids=str,
)
def test_thresholds_are_the_same_to_the_bit(mesh: dict[str, int], vocabulary: int) -> None:
    sizes = tuple(mesh.get(axis, 1) for axis in ("data", "expert", "tensor"))
    placement = Placement(jax.make_mesh(sizes, ("data", "expert", "tensor"), axis_types=(AxisType.Auto,) * 3))
    # Tokens of the first rows tie; the last cases are for the search: k beyond the candidates, p beyond what they have.
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (8, vocabulary)).astype(np.float32)
    logits[:3] = np.round(logits[:3])
    logits[3, random.permutation(vocabulary)[:-5]] = -np.inf
    k = np.array([3, 20, 0, 20, 64, 1, 100, 0], np.int32)
    p = np.array([1.0, 0.95, 0.3, 0.9, 0.4, 0.01, 1.0, 0.999], np.float32)
    filters = jax.jit(lambda backend, *case: (backend.thresholds or thresholds)(*case), static_argnums=0)
    for rows in (slice(0, 6), slice(0, 8)):
        split = jax.device_put(logits[rows], NamedSharding(placement.mesh, P("data" if rows.stop == 8 else None)))
        program = filters.lower(XLA(placement), split, k[rows], p[rows]).compile()
        expected = filters(XLA(), logits[rows], k[rows], p[rows])
        np.testing.assert_array_equal(program(split, k[rows], p[rows]), expected)
    # Of a whole vocabulary on each device there is nothing to sum up.
    assert ("all-gather" in program.as_text()) == (vocabulary != 1001)


@pytest.mark.parametrize("kind", ["TPU v2", "TPU v5 lite", "Tesla T4"])
@pytest.mark.parametrize("grid", [Quantization(8), Quantization(4, 64, embedding=8)], ids=lambda grid: grid.name)
def test_quantised_matrices_as_accelerators_hold_them_are_shared_out(
    make_config: MakeConfig, kind: str, grid: Quantization
) -> None:
    """The width, 192, is 3 groups of 64: on 2 devices each has 3 of 32."""
    sizes = {"vocab_size": 16, "hidden_size": 64, "intermediate_size": 192, "num_heads": 4, "head_dim": 64}
    config = make_config(**sizes, num_kv_heads=2, num_layers=1, tie_embeddings=grid.embedding is not None)
    mesh, rules = make_mesh(4, 2), ShardingRules()
    # jax.sharding.AbstractDevice takes other arguments in each release.
    device = NamedTuple("Device", [("device_kind", str)])(kind)
    placement = Placement(AbstractMesh(mesh.axis_sizes, mesh.axis_names, abstract_device=device), rules)
    infos = held_weights(abstract_weights(config, quantization=grid), placement)
    spread = init_arrays(infos, jax.random.key(0), rules.tree_shardings(infos, mesh))
    if grid.group is not None:
        part = spread.layers[0].ffw.w_down.values
        assert {shard.data.shape[0] for shard in part.addressable_shards} == {part.shape[0] // 2}
    alone = init_arrays(infos, jax.random.key(0))
    tokens, positions = jnp.arange(12).reshape(4, 3), jnp.arange(12).reshape(4, 3) % 3
    run = jax.jit(forward, static_argnames=("config", "placement"))
    expected = run(tokens, positions, alone, config=config)[0]
    got = run(tokens, positions, spread, config=config, placement=Placement(mesh, rules))[0]
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize(("dtype", "int8"), [(jnp.bfloat16, False), (jnp.float32, True)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_on_gpus_is_the_same_on_a_mesh(kv_heads: int, dtype: Any, int8: bool) -> None:
    """In bfloat16 by the kernel, in float32 in blocks; where kv heads do not divide, XLA splits the blocks itself."""
    random = np.random.default_rng(0)
    q = jnp.asarray(random.normal(size=(4, 1, 8, 16)), dtype)
    pools = [jnp.asarray(random.normal(size=(12, kv_heads, 16, 16)), dtype) for _ in range(2)]
    tables, positions = jnp.arange(12).reshape(4, 3)[:, ::-1], jnp.array([[5], [47], [16], [30]])
    k, v = (PagedSlots(QuantizedSlots(*quantize_slots(pool)) if int8 else pool, tables) for pool in pools)
    alone = GPU(interpret=True)
    meshed = GPU(Placement(make_mesh(2, 4)), interpret=True)
    for keys, values in [(k, v), (k.gathered(), v.gathered())]:
        expected = jax.jit(alone.attention)(q, keys, values, positions)
        found = jax.jit(meshed.attention)(q, keys, values, positions)
        np.testing.assert_allclose(
            np.float32(found), np.float32(expected), atol=0.01 if dtype == jnp.bfloat16 else 1e-6
        )
