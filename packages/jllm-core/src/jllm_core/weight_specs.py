"""Weight specification: every array of a model described by its config, and random weights made from that."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.nn.initializers import normal as normal_initializer
from jax.nn.initializers import ones as ones_initializer
from jax.nn.initializers import zeros as zeros_initializer
from jax.sharding import Mesh

from jllm_core.array_info import ArrayInfo, init_arrays
from jllm_core.config import ModelConfig, MoEConfig
from jllm_core.quantization.arrays import Quantization, abstract_quantized
from jllm_core.quantization.device_form import held_weights
from jllm_core.sharding import Placement, ShardingRules
from jllm_core.weights import AttentionLayer, Layer, Leaf, MLPLayer, MoELayer, Weights

# One object for all matrices: a new one each time would be compiled anew each time.
MATRIX_INITIALIZER = normal_initializer(0.02)


def abstract_weights(
    config: ModelConfig, dtype: Any = jnp.float32, quantization: Quantization | None = None
) -> Weights:
    """The description of every array of a model: a Weights tree whose leaves are ArrayInfo.

    Args:
        config: the architecture.
        dtype: element type of every array that is not quantised.
        quantization: how the matrices that tokens are multiplied with are stored, as QuantizedArray of ArrayInfo: all
            but the router of a mixture, and the embedding only where it says so. None stores them like the rest.

    Raises:
        QuantizationError: a group that does not divide an axis it is to cut.
    """

    def info(initializer: Initializer, **axes: int) -> Leaf:
        return ArrayInfo(tuple(axes.values()), jnp.dtype(dtype), tuple(axes), initializer)

    def matrix(inputs: int = 1, batch: int = 0, **axes: int) -> Leaf:
        plain = info(MATRIX_INITIALIZER, **axes)
        return plain if quantization is None else abstract_quantized(plain, quantization, inputs, batch)

    def table(**axes: int) -> Leaf:
        """An embedding, whose rows have a scale each where it is quantised."""
        plain = info(MATRIX_INITIALIZER, **axes)
        if quantization is None or quantization.embedding is None:
            return plain
        return abstract_quantized(plain, Quantization(quantization.embedding), batch=1)

    def gamma(**axes: int) -> Leaf:
        return info(ones_initializer, **axes)

    def bias(present: bool, **axes: int) -> Leaf | None:
        return info(zeros_initializer, **axes) if present else None

    d, f = {"model": config.hidden_size}, {"ffw": config.intermediate_size}
    n, k = {"heads": config.num_heads}, {"kv_heads": config.num_kv_heads}
    h, v = {"head_dim": config.head_dim}, {"vocab": config.vocab_size}

    def experts(moe: MoEConfig) -> MoELayer:
        e, f = {"experts": moe.num_experts}, {"ffw": moe.intermediate_size}
        return MoELayer(
            # Whole on every device: each token's choice is among all experts.
            w_router=ArrayInfo((config.hidden_size, moe.num_experts), dtype, ("model", None), MATRIX_INITIALIZER),
            we_gate=matrix(batch=1, **e, **d, **f),
            we_up=matrix(batch=1, **e, **d, **f),
            we_down=matrix(batch=1, **e, **f, **d),
        )

    def layer(number: int) -> Layer:
        attention = AttentionLayer(
            q=matrix(**d, **n, **h),
            k=matrix(**d, **k, **h),
            v=matrix(**d, **k, **h),
            o=matrix(inputs=2, **n, **h, **d),
            q_gamma=gamma(**h) if config.qk_norm else None,
            k_gamma=gamma(**h) if config.qk_norm else None,
            q_bias=bias(config.qkv_bias, **n, **h),
            k_bias=bias(config.qkv_bias, **k, **h),
            v_bias=bias(config.qkv_bias, **k, **h),
            o_bias=bias(config.o_bias, **d),
        )
        mlp = MLPLayer(
            w_gate=matrix(**d, **f),
            w_up=matrix(**d, **f),
            w_down=matrix(**f, **d),
            b_gate=bias(config.mlp_bias, **f),
            b_up=bias(config.mlp_bias, **f),
            b_down=bias(config.mlp_bias, **d),
        )
        ffw = experts(config.moe) if config.moe and config.is_moe(number) else mlp
        return Layer(ffw=ffw, attn=attention, attn_pre_gamma=gamma(**d), attn_post_gamma=gamma(**d))

    return Weights(
        layers=[layer(number) for number in range(config.num_layers)],
        embedding=table(**v, **d),
        gamma_final=gamma(**d),
        lm_head=None if config.tie_embeddings else matrix(**d, **v),
    )


def init_weights(
    config: ModelConfig,
    key: jax.Array,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    quantization: Quantization | None = None,
) -> Weights:
    """Random weights, each array made in the place the rules give it on the mesh.

    Args:
        config: the architecture.
        key: a JAX random key; the same key gives the same weights on any mesh.
        dtype: element type of every array that is not quantised.
        mesh: devices to spread the arrays over; None leaves them on the default device.
        rules: where each axis goes; tensor-parallel inference when None.
        quantization: random quantised matrices, as ``abstract_weights`` describes them, or where there is a mesh as its
            devices hold them; to measure with.
    """
    tree = abstract_weights(config, dtype, quantization)
    if mesh is not None and quantization is not None:
        tree = held_weights(tree, Placement(mesh, rules or ShardingRules()))
    shardings = None if mesh is None else (rules or ShardingRules()).tree_shardings(tree, mesh)
    weights: Weights = init_arrays(tree, key, shardings)
    return weights
