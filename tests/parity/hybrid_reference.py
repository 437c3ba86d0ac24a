"""Hybrids of transformers as JLLM has them: config and weights taken over array by array, without the converter."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jllm_core.config import DeltaNetConfig, ModelConfig, MoEConfig, RopeScaling
from jllm_core.weights import AttentionLayer, DeltaNetLayer, Layer, MLPLayer, MoELayer, Weights


def hybrid_config(hf: Any) -> ModelConfig:
    """The config of a Qwen3.5, Qwen3.5-MoE or Qwen3-Next."""
    rope = hf.rope_parameters
    scaling = None
    if rope["rope_type"] == "yarn":
        factor, original = rope["factor"], rope["original_max_position_embeddings"]
        scaling = RopeScaling(
            kind="yarn", factor=factor, original_context_length=original, attention_factor=0.1 * math.log(factor) + 1
        )
    moe = None
    if hasattr(hf, "num_experts"):
        moe = MoEConfig(
            num_experts=hf.num_experts,
            experts_per_token=hf.num_experts_per_tok,
            intermediate_size=hf.moe_intermediate_size,
            normalize_weights=getattr(hf, "norm_topk_prob", True),
            shared_size=hf.shared_expert_intermediate_size,
            shared_gate=True,
        )
    mixers = tuple("delta_net" if kind == "linear_attention" else "attention" for kind in hf.layer_types)
    net = DeltaNetConfig(
        num_key_heads=hf.linear_num_key_heads,
        num_value_heads=hf.linear_num_value_heads,
        key_head_dim=hf.linear_key_head_dim,
        value_head_dim=hf.linear_value_head_dim,
        conv_size=hf.linear_conv_kernel_dim,
    )
    return ModelConfig(
        model_type=hf.model_type,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=getattr(hf, "intermediate_size", hf.hidden_size),
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=hf.head_dim,
        context_length=hf.max_position_embeddings * (int(scaling.factor) if scaling else 1),
        rms_norm_eps=hf.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling,
        tie_embeddings=hf.tie_word_embeddings,
        qk_norm=True,
        moe=moe,
        rotary_dim=int(hf.head_dim * rope["partial_rotary_factor"]),
        output_gate=True,
        centered_norm=True,
        mixers=mixers,
        delta_net=net if "delta_net" in mixers else None,
    )


def hybrid_weights(reference: Any, config: ModelConfig, dtype: Any = jnp.float32) -> Weights:
    """The weights of such a model, those that JLLM keeps in float32 as they are in the reference."""
    state = {name: tensor.float().numpy() for name, tensor in reference.state_dict().items()}
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim

    def cast(array: np.ndarray) -> Any:
        return jnp.asarray(array, dtype)

    def heads(matrix: np.ndarray, count: int) -> Any:
        """``[H * width, D]`` as ``[D, H, width]``."""
        return cast(matrix.reshape(count, -1, matrix.shape[1]).transpose(2, 0, 1))

    def attention(get: Any) -> AttentionLayer:
        q, gate = np.split(get("q_proj.weight").reshape(n, 2 * h, -1), 2, axis=1)
        return AttentionLayer(
            q=cast(q.transpose(2, 0, 1)),
            k=heads(get("k_proj.weight"), k),
            v=heads(get("v_proj.weight"), k),
            o=cast(get("o_proj.weight").T.reshape(n, h, -1)),
            q_gamma=cast(get("q_norm.weight")),
            k_gamma=cast(get("k_norm.weight")),
            gate=cast(gate.transpose(2, 0, 1)),
        )

    def delta_net(get: Any, net: DeltaNetConfig) -> DeltaNetLayer:
        keys, values, dk, dv = net.num_key_heads, net.num_value_heads, net.key_head_dim, net.value_head_dim
        cuts = [keys * dk, 2 * keys * dk]
        names = get.names()
        if "in_proj_qkv.weight" in names:
            q, k, v = np.split(get("in_proj_qkv.weight"), cuts)
            z, a, b = (get(f"in_proj_{name}.weight") for name in "zab")
        else:
            # Of each key head: its query, its key, the values and the gates of its value heads.
            each = values // keys
            packed = get("in_proj_qkvz.weight").reshape(keys, -1, config.hidden_size)
            parts = np.split(packed, np.cumsum([dk, dk, each * dv]), axis=1)
            q, k, v, z = (part.reshape(-1, config.hidden_size) for part in parts)
            packed = get("in_proj_ba.weight").reshape(keys, -1, config.hidden_size)
            b, a = (part.reshape(-1, config.hidden_size) for part in np.split(packed, 2, axis=1))
        conv = np.split(get("conv1d.weight")[:, 0], cuts)
        conv_q, conv_k, conv_v = (
            cast(part.reshape(count, -1, net.conv_size).transpose(2, 0, 1))
            for part, count in zip(conv, (keys, keys, values), strict=True)
        )
        return DeltaNetLayer(
            q=heads(q, keys),
            k=heads(k, keys),
            v=heads(v, values),
            z=heads(z, values),
            a=cast(a.T),
            b=cast(b.T),
            conv_q=conv_q,
            conv_k=conv_k,
            conv_v=conv_v,
            a_log=jnp.asarray(get("A_log")),
            dt_bias=jnp.asarray(get("dt_bias")),
            gamma=jnp.asarray(get("norm.weight")),
            o=cast(get("out_proj.weight").T.reshape(values, dv, -1)),
        )

    def mlp(get: Any) -> MLPLayer:
        return MLPLayer(*(cast(get(f"{name}_proj.weight").T) for name in ("gate", "up", "down")))

    def experts(get: Any) -> MoELayer:
        gate, up = np.split(get("experts.gate_up_proj"), 2, axis=1)
        return MoELayer(
            w_router=cast(get("gate.weight").T),
            we_gate=cast(gate.transpose(0, 2, 1)),
            we_up=cast(up.transpose(0, 2, 1)),
            we_down=cast(get("experts.down_proj").transpose(0, 2, 1)),
            shared=mlp(Under(state, get.prefix + "shared_expert.")),
            shared_gate=cast(get("shared_expert_gate.weight")[0]),
        )

    def layer(number: int) -> Layer:
        get = Under(state, f"model.layers.{number}.")
        mixed, ffw = Under(state, get.prefix + "linear_attn."), Under(state, get.prefix + "mlp.")
        net = config.delta_net if config.mixer(number) == "delta_net" else None
        return Layer(
            ffw=mlp(ffw) if config.moe is None else experts(ffw),
            attn=attention(Under(state, get.prefix + "self_attn.")) if net is None else delta_net(mixed, net),
            attn_pre_gamma=cast(get("input_layernorm.weight")),
            attn_post_gamma=cast(get("post_attention_layernorm.weight")),
        )

    return Weights(
        layers=[layer(number) for number in range(config.num_layers)],
        embedding=cast(state["model.embed_tokens.weight"]),
        gamma_final=cast(state["model.norm.weight"]),
        lm_head=None if config.tie_embeddings else cast(state["lm_head.weight"].T),
    )


class Under:
    """The tensors whose names begin alike, by the rest of their names."""

    def __init__(self, state: dict[str, np.ndarray], prefix: str) -> None:
        self.state, self.prefix = state, prefix

    def __call__(self, name: str) -> np.ndarray:
        return self.state[self.prefix + name]

    def names(self) -> set[str]:
        return {name[len(self.prefix) :] for name in self.state if name.startswith(self.prefix)}
