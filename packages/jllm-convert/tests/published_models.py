"""Small models of the newer Qwen families, as Hugging Face folders have them and as llama.cpp's converter does."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .gguf_names import GGUF_NAMES

Tensors = dict[str, np.ndarray]

VOCABULARY, WIDTH, CONTEXT = 23, 32, 64
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, KERNEL = 2, 6, 8, 32, 4
DENSE, EXPERTS, EXPERT, SHARED = 96, 3, 24, 12
LAYERS = ("linear_attention", "full_attention", "linear_attention")

_COMMON: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 3, "max_position_embeddings": CONTEXT},
    **{"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "rms_norm_eps": 1e-5},
    **{"tie_word_embeddings": False, "hidden_act": "silu"},
}
_NETS: dict[str, Any] = {
    **{"linear_num_key_heads": KEY_HEADS, "linear_num_value_heads": VALUE_HEADS, "linear_conv_kernel_dim": KERNEL},
    **{"linear_key_head_dim": KEY_DIM, "linear_value_head_dim": VALUE_DIM, "layer_types": list(LAYERS)},
}
_EXPERTS: dict[str, Any] = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT}
_SHARED = {"shared_expert_intermediate_size": SHARED}
_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 0], "mrope_interleaved": True}
_QUARTER = {**_MROPE, "partial_rotary_factor": 0.25}
_IMAGES = {"vision_config": {"depth": 1}, "image_token_id": 5, "vision_start_token_id": 6}


def composite(model_type: str, text: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model that reads images too."""
    kept = {name: value for name, value in text.items() if name != "tie_word_embeddings"}
    return {
        **{"model_type": model_type, "text_config": {**kept, "model_type": f"{model_type}_text"}},
        **{"tie_word_embeddings": text["tie_word_embeddings"], **_IMAGES},
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"model_type": "qwen2_moe", **_COMMON, **_EXPERTS, **_SHARED, "intermediate_size": DENSE},
    "qwen3_vl": composite("qwen3_vl", {**_COMMON, "intermediate_size": DENSE, "rope_scaling": _MROPE}),
    "qwen3_vl_moe": composite(
        "qwen3_vl_moe", {**_COMMON, **_EXPERTS, "intermediate_size": DENSE, "rope_parameters": _MROPE}
    ),
    "qwen3_next": {
        **{"model_type": "qwen3_next", **_COMMON, **_NETS, **_EXPERTS, **_SHARED, "intermediate_size": DENSE},
        **{"norm_topk_prob": True, "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
    "qwen3_5": composite(
        "qwen3_5",
        {**_COMMON, **_NETS, "intermediate_size": DENSE, "rope_parameters": _QUARTER, "attn_output_gate": True},
    ),
    "qwen3_5_moe": composite(
        "qwen3_5_moe", {**_COMMON, **_NETS, **_EXPERTS, **_SHARED, "rope_parameters": _QUARTER, "mlp_only_layers": []}
    ),
}
HYBRIDS = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
OTHER_PARTS = ("model.visual.blocks.0.attn.qkv.weight", "model.visual.patch_embed.proj.weight", "mtp.fc.weight")


def text_of(model_type: str) -> dict[str, Any]:
    """The fields of the text model, as a flat config.json has them."""
    config = CONFIGS[model_type]
    if "text_config" not in config:
        return config
    return {**config["text_config"], "tie_word_embeddings": config["tie_word_embeddings"]}


def arrays(model_type: str, seed: int = 0) -> Tensors:
    """Random arrays by JLLM's names: what the folder's tensors must become."""
    random = np.random.default_rng(seed)
    config = text_of(model_type)
    made: Tensors = {}

    def add(name: str, *shape: int) -> None:
        # In steps of 1/256, so that 1 + w and its like lose nothing.
        made[name] = (random.integers(-500, 500, shape) / 256).astype(np.float32)

    add("embedding", VOCABULARY, WIDTH)
    add("gamma_final", WIDTH)
    add("lm_head", WIDTH, VOCABULARY)
    for i, kind in enumerate(config.get("layer_types", ("full_attention",) * 3)):
        attn, ffw = f"layers.{i}.attn", f"layers.{i}.ffw"
        add(f"layers.{i}.attn_pre_gamma", WIDTH)
        add(f"layers.{i}.attn_post_gamma", WIDTH)
        if kind == "full_attention":
            for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
                add(f"{attn}.{name}", WIDTH, heads, HEAD_DIM)
                if model_type == "qwen2_moe":
                    add(f"{attn}.{name}_bias", heads, HEAD_DIM)
                elif name != "v":
                    add(f"{attn}.{name}_gamma", HEAD_DIM)
            add(f"{attn}.o", HEADS, HEAD_DIM, WIDTH)
            if model_type in HYBRIDS:
                add(f"{attn}.gate", WIDTH, HEADS, HEAD_DIM)
        else:
            for name, heads, dim in (
                ("q", KEY_HEADS, KEY_DIM),
                ("k", KEY_HEADS, KEY_DIM),
                ("v", VALUE_HEADS, VALUE_DIM),
            ):
                add(f"{attn}.{name}", WIDTH, heads, dim)
                add(f"{attn}.conv_{name}", KERNEL, heads, dim)
            add(f"{attn}.z", WIDTH, VALUE_HEADS, VALUE_DIM)
            add(f"{attn}.o", VALUE_HEADS, VALUE_DIM, WIDTH)
            add(f"{attn}.gamma", VALUE_DIM)
            for name in ("a", "b"):
                add(f"{attn}.{name}", WIDTH, VALUE_HEADS)
            for name in ("a_log", "dt_bias"):
                add(f"{attn}.{name}", VALUE_HEADS)
        if "num_experts" not in config:
            _add_mlp(add, ffw, DENSE)
            continue
        add(f"{ffw}.w_router", WIDTH, EXPERTS)
        for name in ("gate", "up"):
            add(f"{ffw}.we_{name}", EXPERTS, WIDTH, EXPERT)
        add(f"{ffw}.we_down", EXPERTS, EXPERT, WIDTH)
        if "shared_expert_intermediate_size" in config:
            _add_mlp(add, f"{ffw}.shared", SHARED)
            add(f"{ffw}.shared_gate", WIDTH)
    return made


def _add_mlp(add: Any, owner: str, width: int) -> None:
    add(f"{owner}.w_gate", WIDTH, width)
    add(f"{owner}.w_up", WIDTH, width)
    add(f"{owner}.w_down", width, WIDTH)


def _rows(array: np.ndarray) -> np.ndarray:
    """``[D, ...]`` as the weight of a torch ``nn.Linear``, ``[out, D]``."""
    return array.reshape(len(array), -1).T


def hf_tensors(model_type: str, made: Tensors, one_by_one: bool = False) -> Tensors:
    """The arrays as Hugging Face names and lays them out, without a prefix of nested models.

    Args:
        model_type: the family.
        made: the arrays.
        one_by_one: a tensor for each expert, where the family is published with one for all of them.
    """
    fused = model_type in ("qwen3_5_moe", "qwen3_vl_moe") and not one_by_one
    tensors: Tensors = {
        "model.embed_tokens.weight": made["embedding"],
        "model.norm.weight": made["gamma_final"],
        "lm_head.weight": made["lm_head"].T,
    }
    for i in range(3):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        tensors[f"{theirs}.input_layernorm.weight"] = made[f"{ours}.attn_pre_gamma"]
        tensors[f"{theirs}.post_attention_layernorm.weight"] = made[f"{ours}.attn_post_gamma"]
        attn = {name.rpartition(".")[2]: array for name, array in made.items() if name.startswith(f"{ours}.attn.")}
        ffw = {
            name.removeprefix(f"{ours}.ffw."): each for name, each in made.items() if name.startswith(f"{ours}.ffw.")
        }
        parts = _net(attn, model_type == "qwen3_next") if "a_log" in attn else _attention(attn)
        parts |= _experts(ffw, fused, model_type) if "w_router" in ffw else _mlp(ffw, "mlp", "")
        tensors |= {f"{theirs}.{name}": tensor for name, tensor in parts.items()}
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _attention(attn: Tensors) -> Tensors:
    queries = [attn["q"]] if "gate" not in attn else [attn["q"], attn["gate"]]
    # Head by head: the rows of q, then those of the gate.
    heads = [_rows(each[:, head]) for head in range(HEADS) for each in queries]
    parts = {
        "q_proj.weight": np.concatenate(heads),
        "k_proj.weight": _rows(attn["k"]),
        "v_proj.weight": _rows(attn["v"]),
    }
    parts["o_proj.weight"] = attn["o"].reshape(-1, WIDTH).T
    parts |= {f"{name[0]}_norm.weight": attn[name] for name in ("q_gamma", "k_gamma") if name in attn}
    parts |= {f"{name}_proj.bias": attn[f"{name}_bias"].reshape(-1) for name in "qkv" if f"{name}_bias" in attn}
    return {f"self_attn.{name}": tensor for name, tensor in parts.items()}


def _net(attn: Tensors, by_key_head: bool) -> Tensors:
    each = VALUE_HEADS // KEY_HEADS
    parts = {"A_log": attn["a_log"], "dt_bias": attn["dt_bias"], "norm.weight": attn["gamma"]}
    parts["out_proj.weight"] = attn["o"].reshape(-1, WIDTH).T
    channels = [attn[f"conv_{name}"].reshape(KERNEL, -1).T for name in "qkv"]
    parts["conv1d.weight"] = np.concatenate(channels)[:, None]
    if by_key_head:
        groups = [slice(key * each, (key + 1) * each) for key in range(KEY_HEADS)]
        qkvz = [
            part
            for key, own in enumerate(groups)
            for part in (attn["q"][:, key], attn["k"][:, key], attn["v"][:, own], attn["z"][:, own])
        ]
        parts["in_proj_qkvz.weight"] = np.concatenate([_rows(part) for part in qkvz])
        ba = [part for own in groups for part in (attn["b"][:, own], attn["a"][:, own])]
        parts["in_proj_ba.weight"] = np.concatenate([_rows(part) for part in ba])
    else:
        parts["in_proj_qkv.weight"] = np.concatenate([_rows(attn[name]) for name in "qkv"])
        parts |= {f"in_proj_{name}.weight": _rows(attn[name]) for name in "zab"}
    return {f"linear_attn.{name}": tensor for name, tensor in parts.items()}


def _mlp(ffw: Tensors, owner: str, prefix: str) -> Tensors:
    return {f"{owner}.{name}_proj.weight": ffw[f"{prefix}w_{name}"].T for name in ("gate", "up", "down")}


def _experts(ffw: Tensors, fused: bool, model_type: str) -> Tensors:
    parts = {"mlp.gate.weight": ffw["w_router"].T}
    gate, up, down = (ffw[f"we_{name}"] for name in ("gate", "up", "down"))
    if fused and model_type == "qwen3_vl_moe":
        parts |= {"mlp.experts.gate_up_proj": np.concatenate([gate, up], axis=2), "mlp.experts.down_proj": down}
    elif fused:
        parts["mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=2).swapaxes(1, 2)
        parts["mlp.experts.down_proj"] = down.swapaxes(1, 2)
    else:
        for e in range(EXPERTS):
            for name, array in (("gate", gate), ("up", up), ("down", down)):
                parts[f"mlp.experts.{e}.{name}_proj.weight"] = array[e].T
    if "shared_gate" in ffw:
        parts |= _mlp(ffw, "mlp.shared_expert", "shared.")
        parts["mlp.shared_expert_gate.weight"] = ffw["shared_gate"][None]
    return parts


def nested(model_type: str, tensors: Mapping[str, np.ndarray]) -> Tensors:
    """The same tensors by their names beside a vision encoder, and some of the other parts'."""
    renamed = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: tensor
        for name, tensor in tensors.items()
    }
    others = [name for name in OTHER_PARTS if model_type in HYBRIDS or not name.startswith("mtp.")]
    return renamed | {name: np.ones(2, np.float32) for name in others}


def _tiled(tensor: np.ndarray, axis: int = 0) -> np.ndarray:
    """Value heads from grouped to tiled order along one axis, as ``_reorder_v_heads`` of llama.cpp."""
    size = tensor.shape[axis] // VALUE_HEADS
    each = VALUE_HEADS // KEY_HEADS
    split = (*tensor.shape[:axis], KEY_HEADS, each, size, *tensor.shape[axis + 1 :])
    return np.ascontiguousarray(tensor.reshape(split).swapaxes(axis, axis + 1).reshape(tensor.shape))


ARCHITECTURES = {
    **{"qwen2_moe": "qwen2moe", "qwen3_vl": "qwen3vl", "qwen3_vl_moe": "qwen3vlmoe"},
    **{"qwen3_next": "qwen3next", "qwen3_5": "qwen35", "qwen3_5_moe": "qwen35moe"},
}


def gguf_metadata(model_type: str) -> dict[str, Any]:
    """The metadata, without the architecture's prefix, that llama.cpp's converter writes."""
    config = text_of(model_type)
    rope = config.get("rope_parameters", config.get("rope_scaling", config))
    known: dict[str, Any] = {
        **{"block_count": 3, "context_length": CONTEXT, "embedding_length": WIDTH, "attention.head_count": HEADS},
        **{"attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM},
        **{"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": float(rope.get("rope_theta", 10000.0))},
    }
    if "intermediate_size" in config:
        known["feed_forward_length"] = DENSE
    if "num_experts" in config:
        known |= {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": EXPERT}
    if "shared_expert_intermediate_size" in config:
        known["expert_shared_feed_forward_length"] = SHARED
    if model_type.startswith("qwen3_vl"):
        known |= {"rope.dimension_sections": [1, 1, 0, 0], "n_deepstack_layers": 3}
    if model_type in HYBRIDS:
        known |= {
            **{"ssm.conv_kernel": KERNEL, "ssm.state_size": KEY_DIM, "ssm.group_count": KEY_HEADS},
            **{"ssm.time_step_rank": VALUE_HEADS, "ssm.inner_size": VALUE_HEADS * VALUE_DIM},
            **{"attention.recurrent_layers": [kind == "linear_attention" for kind in LAYERS]},
            **{"full_attention_interval": 2, "rope.dimension_count": HEAD_DIM // 4},
        }
    return known


def gguf_tensors(model_type: str, made: Tensors) -> Tensors:
    """The arrays as llama.cpp's converter writes them."""
    hybrid = model_type in HYBRIDS
    names = GGUF_NAMES | ({"post_attention_layernorm": "post_attention_norm"} if hybrid else {})
    tensors: Tensors = {}
    for name, tensor in hf_tensors(model_type, made, one_by_one=True).items():
        if ".mlp.experts." in name:
            continue
        _, _, rest = name.rpartition("layers.")
        number, _, local = rest.partition(".") if "layers." in name else ("", "", name)
        module = local.removesuffix(".weight").removesuffix(".bias") if not local.endswith("dt_bias") else local
        block = f"blk.{number}." if number else ""
        if hybrid and module.endswith("norm") and module != "linear_attn.norm":
            tensor = tensor + 1
        if "linear_attn" in module:
            if module == "linear_attn.in_proj_qkvz":
                attn = f"layers.{number}.attn"
                tensors[f"{block}attn_qkv.weight"] = np.concatenate([_rows(made[f"{attn}.{each}"]) for each in "qkv"])
                tensors[f"{block}attn_gate.weight"] = _rows(made[f"{attn}.z"])
                continue
            tensor = _llama_cpp(module, tensor, tiled=model_type != "qwen3_next")
        if module == "mlp.shared_expert_gate":
            tensor = tensor[0]
        suffix = "" if module.endswith(("A_log", "dt_bias")) else local[len(module) :]
        tensors[f"{block}{names[module]}{suffix}"] = tensor
    for name, array in made.items():
        if ".we_" in name:
            _, number, _, which = name.split(".")
            tensors[f"blk.{number}.ffn_{which.removeprefix('we_')}_exps.weight"] = array.swapaxes(1, 2)
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _llama_cpp(module: str, tensor: np.ndarray, tiled: bool) -> np.ndarray:
    """What llama.cpp's converter changes in a tensor of a delta net."""
    name = module.removeprefix("linear_attn.")
    if name == "A_log":
        tensor = -np.exp(tensor)
    if name == "conv1d":
        tensor = tensor[:, 0]
    if not tiled or name in ("norm", "in_proj_ba"):
        return tensor
    if name in ("in_proj_qkv", "conv1d"):
        keys = 2 * KEY_HEADS * KEY_DIM
        return np.concatenate([tensor[:keys], _tiled(tensor[keys:])])
    return _tiled(tensor, axis=1 if name == "out_proj" else 0)
