"""ArrayInfo, and the trees that are made from trees of it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn.initializers import normal, ones
from jllm_core import ArrayInfo, ModelConfig, Weights, abstract_weights, init_weights
from jllm_core.array_info import abstract_arrays, init_arrays, named_leaves

MakeConfig = Callable[..., ModelConfig]
NORMAL = normal(1.0)


def info(*shape: int, dtype: type = np.float32) -> ArrayInfo:
    return ArrayInfo(shape, dtype, (None,) * len(shape), NORMAL)


def test_an_array_info_is_a_leaf() -> None:
    assert jax.tree.leaves({"a": info(2, 3)}) == [info(2, 3)]


@pytest.mark.usefixtures("unchecked_types")
def test_shape_and_dtype_are_normalised() -> None:
    made = ArrayInfo((np.int64(2),), "bfloat16", ["model"])  # type: ignore[arg-type]
    assert made == ArrayInfo((2,), np.dtype(jnp.bfloat16), ("model",))
    assert type(made.shape[0]) is int
    assert hash(made) == hash(ArrayInfo((2,), jnp.bfloat16, ("model",)))


@pytest.mark.parametrize(
    ("shape", "dtype", "size", "nbytes"),
    [((2, 3), "float32", 6, 24), ((2, 3), "bfloat16", 6, 12), ((), "float32", 1, 4), ((0, 5), "float32", 0, 0)],
)
def test_size_and_nbytes(shape: tuple[int, ...], dtype: str, size: int, nbytes: int) -> None:
    made = ArrayInfo(shape, dtype, (None,) * len(shape))
    assert (made.size, made.nbytes) == (size, nbytes)


def test_nbytes_does_not_overflow_32_bits() -> None:
    assert ArrayInfo((1 << 20, 1 << 20), "float32", (None, None)).nbytes == 1 << 42


def test_axes_that_do_not_fit_the_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\) has 2 axes, but 1 logical axes"):
        ArrayInfo((2, 3), np.float32, ("model",))


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="no negative sizes"):
        ArrayInfo((2, -3), np.float32, ("model", "ffw"))


def test_leaves_are_named_by_their_path(make_config: MakeConfig) -> None:
    names = list(named_leaves(abstract_weights(make_config(num_layers=1, tie_embeddings=True))))
    assert sorted(names) == [
        "embedding",
        "gamma_final",
        "layers.0.attn.k",
        "layers.0.attn.o",
        "layers.0.attn.q",
        "layers.0.attn.v",
        "layers.0.attn_post_gamma",
        "layers.0.attn_pre_gamma",
        "layers.0.ffw.w_down",
        "layers.0.ffw.w_gate",
        "layers.0.ffw.w_up",
    ]


def test_named_leaves_keep_the_order_of_the_tree(make_config: MakeConfig) -> None:
    tree = abstract_weights(make_config(num_layers=11))
    assert list(named_leaves(tree).values()) == jax.tree.leaves(tree)
    assert {"layers.2.attn.q", "layers.10.attn.q"} <= set(named_leaves(tree))


def test_abstract_arrays_carry_shape_dtype_and_sharding() -> None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    (struct,) = jax.tree.leaves(abstract_arrays([info(2, 3, dtype=jnp.bfloat16)], [sharding]))
    assert (struct.shape, struct.dtype, struct.sharding) == ((2, 3), jnp.bfloat16, sharding)
    (struct,) = jax.tree.leaves(abstract_arrays([info(2, 3)]))
    assert (struct.shape, struct.dtype, struct.sharding) == ((2, 3), jnp.float32, None)


def test_init_depends_on_the_name_and_the_key_alone() -> None:
    key = jax.random.key(0)
    alone = init_arrays({"a": info(4)}, key)["a"]
    tree = init_arrays({"a": info(4), "A": info(4), "b": {"a": info(4)}}, key)
    np.testing.assert_array_equal(tree["a"], alone)
    others = [tree["A"], tree["b"]["a"], init_arrays({"a": info(4)}, jax.random.key(1))["a"]]
    assert not any(np.array_equal(other, alone) for other in others)


def test_init_follows_the_initializer_and_the_dtype() -> None:
    tree = {"gamma": ArrayInfo((3,), jnp.bfloat16, ("model",), ones)}
    made = init_arrays(tree, jax.random.key(0))["gamma"]
    assert made.dtype == jnp.bfloat16
    np.testing.assert_array_equal(made, np.ones(3))


def test_init_names_the_array_that_has_no_initializer() -> None:
    with pytest.raises(ValueError, match=r"layer\.mystery has no initializer"):
        init_arrays({"layer": {"mystery": ArrayInfo((3,), np.float32, ("model",))}}, jax.random.key(0))


@pytest.mark.parametrize("tied", [True, False])
def test_biases_norms_and_head_are_there_where_the_config_has_them(make_config: MakeConfig, tied: bool) -> None:
    plain = named_leaves(abstract_weights(make_config(num_layers=1, tie_embeddings=tied)))
    full = named_leaves(
        abstract_weights(
            make_config(num_layers=1, tie_embeddings=tied, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True)
        )
    )
    assert ("lm_head" in plain) is not tied
    added = {name.removeprefix("layers.0."): leaf.shape for name, leaf in full.items() if name not in plain}
    assert added == {
        "attn.q_bias": (6, 4),
        "attn.k_bias": (2, 4),
        "attn.v_bias": (2, 4),
        "attn.o_bias": (12,),
        "attn.q_gamma": (4,),
        "attn.k_gamma": (4,),
        "ffw.b_gate": (10,),
        "ffw.b_up": (10,),
        "ffw.b_down": (12,),
    }


def test_every_array_has_the_shape_and_axes_of_the_notation(make_config: MakeConfig) -> None:
    infos = named_leaves(abstract_weights(make_config(num_layers=1), jnp.bfloat16))
    described = {name: (leaf.shape, leaf.logical_axes) for name, leaf in infos.items()}
    assert described == {
        "embedding": ((13, 12), ("vocab", "model")),
        "lm_head": ((12, 13), ("model", "vocab")),
        "gamma_final": ((12,), ("model",)),
        "layers.0.attn_pre_gamma": ((12,), ("model",)),
        "layers.0.attn_post_gamma": ((12,), ("model",)),
        "layers.0.attn.q": ((12, 6, 4), ("model", "heads", "head_dim")),
        "layers.0.attn.k": ((12, 2, 4), ("model", "kv_heads", "head_dim")),
        "layers.0.attn.v": ((12, 2, 4), ("model", "kv_heads", "head_dim")),
        "layers.0.attn.o": ((6, 4, 12), ("heads", "head_dim", "model")),
        "layers.0.ffw.w_gate": ((12, 10), ("model", "ffw")),
        "layers.0.ffw.w_up": ((12, 10), ("model", "ffw")),
        "layers.0.ffw.w_down": ((10, 12), ("ffw", "model")),
    }
    assert {leaf.dtype for leaf in infos.values()} == {np.dtype(jnp.bfloat16)}


def test_init_weights_fills_the_whole_tree(make_config: MakeConfig) -> None:
    # Few shapes: each is a program to compile.
    sizes = {"vocab_size": 4, "hidden_size": 4, "intermediate_size": 4, "num_heads": 4, "num_kv_heads": 4}
    config = make_config(**sizes, num_layers=1, qkv_bias=True, qk_norm=True)
    weights = init_weights(config, jax.random.key(0))
    assert isinstance(weights, Weights)
    infos, arrays = named_leaves(abstract_weights(config)), named_leaves(weights)
    assert {name: leaf.shape for name, leaf in arrays.items()} == {name: leaf.shape for name, leaf in infos.items()}
    attn = weights.layers[0].attn
    assert 0.01 < np.std(attn.q) < 0.03
    assert not np.array_equal(attn.k, attn.q)
    np.testing.assert_array_equal(attn.q_bias, np.zeros((4, 4)))
    np.testing.assert_array_equal(weights.gamma_final, np.ones(4))
