"""Weight specification: every array of a model described by its config, and random weights made from that."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer
from jax.nn.initializers import normal as normal_initializer
from jax.nn.initializers import ones as ones_initializer
from jax.nn.initializers import zeros as zeros_initializer
from jax.sharding import Mesh

from jllm_core.array_info import ArrayInfo, init_arrays
from jllm_core.config import DeltaNetConfig, ModelConfig, MoEConfig
from jllm_core.quantization.arrays import Quantization, abstract_quantized
from jllm_core.quantization.device_form import held_weights
from jllm_core.sharding import Placement, ShardingRules
from jllm_core.weights import AttentionLayer, DeltaNetLayer, Layer, Leaf, MLPLayer, MoELayer, Weights

# One object for all matrices: a new one each time would be compiled anew each time.
MATRIX_INITIALIZER = normal_initializer(0.02)
CONV_INITIALIZER = normal_initializer(0.3)


def log_decay_initializer(
    key: jax.Array, shape: Any, dtype: Any | None = None, out_sharding: Any | None = None
) -> jax.Array:
    """Logarithms of decays from 1 to 16, as ``a_log`` of delta nets is drawn in their reference."""
    return jnp.log(jax.random.uniform(key, shape, dtype or jnp.float32, 1, 16))


def abstract_weights(
    config: ModelConfig, dtype: Any = jnp.float32, quantization: Quantization | None = None
) -> Weights:
    """The description of every array of a model: a Weights tree whose leaves are ArrayInfo.

    Args:
        config: the architecture.
        dtype: element type of every array that is not quantised.
        quantization: how the matrices that tokens are multiplied with are stored, as QuantizedArray of ArrayInfo. All
            but routers, gates of one number a head or token, and the embedding, where it does not say so. None stores
            them like the rest.

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
        return info(zeros_initializer if config.centered_norm else ones_initializer, **axes)

    def bias(present: bool, **axes: int) -> Leaf | None:
        return info(zeros_initializer, **axes) if present else None

    d = {"model": config.hidden_size}
    n, k = {"heads": config.num_heads}, {"kv_heads": config.num_kv_heads}
    h, v = {"head_dim": config.head_dim}, {"vocab": config.vocab_size}

    def mlp(biases: bool, **f: int) -> MLPLayer:
        return MLPLayer(
            w_gate=matrix(**d, **f),
            w_up=matrix(**d, **f),
            w_down=matrix(**f, **d),
            b_gate=bias(biases, **f),
            b_up=bias(biases, **f),
            b_down=bias(biases, **d),
        )

    def experts(moe: MoEConfig) -> MoELayer:
        e, f = {"experts": moe.num_experts}, {"ffw": moe.intermediate_size}
        return MoELayer(
            # Whole on every device: each token's choice is among all experts.
            w_router=ArrayInfo((config.hidden_size, moe.num_experts), dtype, ("model", None), MATRIX_INITIALIZER),
            we_gate=matrix(batch=1, **e, **d, **f),
            we_up=matrix(batch=1, **e, **d, **f),
            we_down=matrix(batch=1, **e, **f, **d),
            shared=mlp(False, shared_ffw=moe.shared_size) if moe.shared_size else None,
            shared_gate=info(MATRIX_INITIALIZER, **d) if moe.shared_gate else None,
        )

    def delta_net(net: DeltaNetConfig) -> DeltaNetLayer:
        keys, values = {"key_heads": net.num_key_heads}, {"value_heads": net.num_value_heads}
        dk, dv = {"head_dim": net.key_head_dim}, {"head_dim": net.value_head_dim}

        def conv(**axes: int) -> ArrayInfo:
            return ArrayInfo((net.conv_size, *axes.values()), dtype, (None, *axes), CONV_INITIALIZER)

        def float32(initializer: Initializer, **axes: int) -> ArrayInfo:
            return ArrayInfo(tuple(axes.values()), np.float32, tuple(axes), initializer)

        return DeltaNetLayer(
            q=matrix(**d, **keys, **dk),
            k=matrix(**d, **keys, **dk),
            v=matrix(**d, **values, **dv),
            z=matrix(**d, **values, **dv),
            a=info(MATRIX_INITIALIZER, **d, **values),
            b=info(MATRIX_INITIALIZER, **d, **values),
            conv_q=conv(**keys, **dk),
            conv_k=conv(**keys, **dk),
            conv_v=conv(**values, **dv),
            a_log=float32(log_decay_initializer, **values),
            dt_bias=float32(ones_initializer, **values),
            gamma=float32(ones_initializer, **dv),
            o=matrix(inputs=2, **values, **dv, **d),
        )

    def attention() -> AttentionLayer:
        return AttentionLayer(
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
            gate=matrix(**d, **n, **h) if config.output_gate else None,
        )

    def layer(number: int) -> Layer:
        is_net, is_moe = config.mixer(number) == "delta_net", config.is_moe(number)
        # In the order of the computation, which is the order in which what does not fit is told.
        attn = delta_net(config.delta_net) if config.delta_net and is_net else attention()
        return Layer(
            ffw=experts(config.moe) if config.moe and is_moe else mlp(config.mlp_bias, ffw=config.intermediate_size),
            attn=attn,
            attn_pre_gamma=gamma(**d),
            attn_post_gamma=gamma(**d),
        )

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
    from jllm_core.mesh_axes import model_rules  # for who makes weights, not for who describes them

    tree, shardings = abstract_weights(config, dtype, quantization), None
    if mesh is not None:
        rules = model_rules(config, mesh, rules)
        tree = tree if quantization is None else held_weights(tree, Placement(mesh, rules))
        shardings = rules.tree_shardings(tree, mesh)
    weights: Weights = init_arrays(tree, key, shardings)
    return weights
