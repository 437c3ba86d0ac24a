"""Seed files for the GGUF fuzz target (fuzz/corpus/gguf): together they have every kind of metadata and of tensor.

    python fuzz/seeds_gguf.py

Each has a valid config, so that the fuzzer starts behind the first checks.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

CORPUS = Path(__file__).parent / "corpus" / "gguf"
CONFIG = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 32,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 8,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}
BYTE_LEVEL = {
    "model": "gpt2",
    "pre": "qwen2",
    "tokens": ["a", "b", "ab", "<s>", "[PAD4]"],
    "token_type": [1, 1, 1, 3, 5],
    "merges": ["a b"],
    "bos_token_id": 3,
    "eos_token_id": 3,
    "add_bos_token": True,
}
SENTENCEPIECE = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", "</s>", "a", "aa"],
    "token_type": [2, 3, 3, 1, 1],
    "scores": [0.0, 0.0, 0.0, -1.0, -2.0],
    "add_space_prefix": False,
}


def write(
    name: str,
    family: str,
    tensors: Mapping[str, tuple[Kind, tuple[int, ...]]],
    config: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    version: int = 3,
    alignment: int | None = None,
) -> None:
    """Write a file of random tensors: name -> type and shape."""
    writer = gguf.GGUFWriter(CORPUS / f"{name}.gguf", family)
    if alignment:
        writer.add_custom_alignment(alignment)
    pairs = {f"{family}.{key}": value for key, value in {**CONFIG, **(config or {})}.items()}
    pairs |= {f"tokenizer.ggml.{key}": value for key, value in (tokenizer or {}).items()}
    for key, value in pairs.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case list():
                writer.add_array(key, value)
            case _:
                writer.add_string(key, value)
    random = np.random.default_rng(0)
    for tensor, (kind, shape) in tensors.items():
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        row = shape[-1] // block * block_bytes
        writer.add_tensor(tensor, random.integers(0, 60, (*shape[:-1], row), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if version != 3:
        path = CORPUS / f"{name}.gguf"
        content = path.read_bytes()
        path.write_bytes(content[:4] + version.to_bytes(4, "little") + content[8:])


def main() -> None:
    CORPUS.mkdir(parents=True, exist_ok=True)
    embedding = {"token_embd.weight": (Kind.Q8_0, (5, 32))}
    norm = {"blk.0.attn_norm.weight": (Kind.F32, (32,))}
    write("llama", "llama", embedding | norm, tokenizer=BYTE_LEVEL)
    write("llama_sentencepiece", "llama", embedding, tokenizer=SENTENCEPIECE)
    write("llama_factors", "llama", embedding | {"rope_freqs.weight": (Kind.F32, (4,))}, alignment=8)
    write("llama_linear_v2", "llama", embedding, {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, version=2)
    bias = {"blk.0.attn_q.bias": (Kind.F16, (32,)), "output.weight": (Kind.BF16, (5, 32))}
    write("qwen2_bias", "qwen2", embedding | bias)
    experts = {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 10}
    stack = {"blk.0.ffn_down_exps.weight": (Kind.Q4_0, (3, 4, 32))}
    write("qwen3moe_experts", "qwen3moe", embedding | stack, experts)
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
    write("smollm3_yarn", "smollm3", embedding, yarn)
    kinds = (Kind.Q4_K, Kind.Q6_K, Kind.IQ2_XXS, Kind.TQ1_0, Kind.MXFP4)
    write("qwen3_types", "qwen3", embedding | {f"blk.0.{kind.name}": (kind, (2, 256)) for kind in kinds})


if __name__ == "__main__":
    main()
