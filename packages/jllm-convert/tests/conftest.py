"""Shared fixtures: small models as their publishers store them, and the expected arrays."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from .gguf_names import GGUF_NAMES

# A config.json of transformers 4. No size is the product or the quotient of others, and 4 heads of 6 are not 16 wide.
TINY_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 3,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., dict[str, Any]]:
    """The config.json of a small Llama; keyword arguments change it."""

    def make(**changes: Any) -> dict[str, Any]:
        return {**TINY_LLAMA, **changes}

    return make


@pytest.fixture(scope="session")
def hf_tensors() -> Callable[[Mapping[str, Any]], dict[str, np.ndarray]]:
    """Random tensors, by the names and in the shapes of transformers, for a config.json."""

    def make(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        q, kv = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            shapes |= {
                f"{layer}.input_layernorm.weight": (d,),
                f"{layer}.post_attention_layernorm.weight": (d,),
                f"{layer}.self_attn.q_proj.weight": (q, d),
                f"{layer}.self_attn.k_proj.weight": (kv, d),
                f"{layer}.self_attn.v_proj.weight": (kv, d),
                f"{layer}.self_attn.o_proj.weight": (d, q),
                f"{layer}.mlp.gate_proj.weight": (f, d),
                f"{layer}.mlp.up_proj.weight": (f, d),
                f"{layer}.mlp.down_proj.weight": (d, f),
            }
            if config["model_type"] == "qwen3":
                shapes |= {f"{layer}.self_attn.{n}_norm.weight": (config["head_dim"],) for n in "qk"}
            if config.get("attention_bias"):
                sizes = {"q": q, "k": kv, "v": kv, "o": d}
                shapes |= {f"{layer}.self_attn.{n}_proj.bias": (size,) for n, size in sizes.items()}
            if config.get("mlp_bias"):
                sizes = {"gate": f, "up": f, "down": d}
                shapes |= {f"{layer}.mlp.{n}_proj.bias": (size,) for n, size in sizes.items()}
        if not config.get("tie_word_embeddings"):
            shapes["lm_head.weight"] = (v, d)
        return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    return make


@pytest.fixture(scope="session")
def expected_arrays() -> Callable[..., dict[str, np.ndarray]]:
    """The arrays, by their JLLM names, that the tensors of a config.json must become."""

    def make(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        h = config["head_dim"]
        arrays = {"embedding": tensors["model.embed_tokens.weight"], "gamma_final": tensors["model.norm.weight"]}
        if "lm_head.weight" in tensors and not config.get("tie_word_embeddings"):
            arrays["lm_head"] = tensors["lm_head.weight"].T
        for i in range(config["num_hidden_layers"]):
            ours, attn, mlp = f"layers.{i}", f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
            arrays[f"{ours}.attn_pre_gamma"] = tensors[f"model.layers.{i}.input_layernorm.weight"]
            arrays[f"{ours}.attn_post_gamma"] = tensors[f"model.layers.{i}.post_attention_layernorm.weight"]
            for n in "qkv":
                rows = tensors[f"{attn}.{n}_proj.weight"]
                arrays[f"{ours}.attn.{n}"] = np.stack(
                    [rows[start : start + h].T for start in range(0, len(rows), h)], axis=1
                )
                if f"{attn}.{n}_proj.bias" in tensors:
                    bias = tensors[f"{attn}.{n}_proj.bias"]
                    arrays[f"{ours}.attn.{n}_bias"] = np.stack(np.split(bias, len(bias) // h))
                if f"{attn}.{n}_norm.weight" in tensors:
                    arrays[f"{ours}.attn.{n}_gamma"] = tensors[f"{attn}.{n}_norm.weight"]
            columns = tensors[f"{attn}.o_proj.weight"]
            arrays[f"{ours}.attn.o"] = np.stack(
                [columns[:, start : start + h].T for start in range(0, columns.shape[1], h)]
            )
            if f"{attn}.o_proj.bias" in tensors:
                arrays[f"{ours}.attn.o_bias"] = tensors[f"{attn}.o_proj.bias"]
            for n in ("gate", "up", "down"):
                arrays[f"{ours}.ffw.w_{n}"] = tensors[f"{mlp}.{n}_proj.weight"].T
                if f"{mlp}.{n}_proj.bias" in tensors:
                    arrays[f"{ours}.ffw.b_{n}"] = tensors[f"{mlp}.{n}_proj.bias"]
        return arrays

    return make


@pytest.fixture(scope="session")
def write_hf() -> Callable[..., Path]:
    """Writes a Hugging Face folder: one safetensors file, or as many shards as the dict of dicts names."""

    def write(
        folder: Path,
        config: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray] | None = None,
        shards: Mapping[str, Mapping[str, np.ndarray]] | None = None,
        **json_files: Any,
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        if tensors is not None:
            save_file(dict(tensors), folder / "model.safetensors")
        if shards is not None:
            for name, part in shards.items():
                save_file(dict(part), folder / name)
            weight_map = {tensor: name for name, part in shards.items() for tensor in part}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        for name, content in json_files.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        return folder

    return write


@pytest.fixture(scope="session")
def gguf_metadata() -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """The metadata, without the architecture's prefix, that llama.cpp writes for a config.json."""

    def make(config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "block_count": config["num_hidden_layers"],
            "context_length": config["max_position_embeddings"],
            "embedding_length": config["hidden_size"],
            "feed_forward_length": config["intermediate_size"],
            "attention.head_count": config["num_attention_heads"],
            "attention.head_count_kv": config["num_key_value_heads"],
            "attention.key_length": config["head_dim"],
            "attention.value_length": config["head_dim"],
            "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
            "rope.freq_base": float(config["rope_theta"]),
            "rope.dimension_count": config["head_dim"],
            "vocab_size": config["vocab_size"],
        }

    return make


@pytest.fixture(scope="session")
def gguf_tensors() -> Callable[[Mapping[str, Any], Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """Hugging Face tensors as llama.cpp's converter names them and, for Llama, orders the rows of q and k."""

    def permute(rows: np.ndarray, heads: int) -> np.ndarray:
        # As convert_hf_to_gguf.py has it (LlamaModel.permute).
        return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    def make(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        renamed = {}
        for name, tensor in tensors.items():
            module, kind = name.rsplit(".", 1)
            block = ""
            if module.startswith("model.layers."):
                _, _, number, module = module.split(".", 3)
                block = f"blk.{number}."
            known = GGUF_NAMES[module]
            if known in heads and config["model_type"] == "llama":
                tensor = permute(tensor, heads[known])
            renamed[f"{block}{known}.{kind}"] = tensor
        return renamed

    return make


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., Path]:
    """Writes a GGUF file. ``types`` says which tensors are stored as another type than their own."""

    def write(
        path: Path,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        architecture: str = "llama",
        types: Mapping[str, gguf.GGMLQuantizationType] | None = None,
        **general: Any,
    ) -> Path:
        writer = gguf.GGUFWriter(path, architecture)
        named = {f"{architecture}.{name}": value for name, value in metadata.items()}
        for name, value in {**named, **{key.replace("__", "."): value for key, value in general.items()}}.items():
            if isinstance(value, bool):
                writer.add_bool(name, value)
            elif isinstance(value, int):
                writer.add_uint32(name, value)
            elif isinstance(value, float):
                writer.add_float32(name, value)
            elif isinstance(value, list):
                writer.add_array(name, value)
            else:
                writer.add_string(name, value)
        for name, tensor in tensors.items():
            kind = (types or {}).get(name)
            if kind is not None:
                writer.add_tensor(name, gguf.quantize(tensor.astype(np.float32), kind), raw_dtype=kind)
            elif tensor.dtype == ml_dtypes.bfloat16:
                writer.add_tensor(name, tensor.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
            else:
                writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """Calls as a user's own are: without the checks of jaxtyping, which would refuse a wrong type before we do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
