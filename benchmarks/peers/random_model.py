"""Random weights in the shapes of Qwen3-0.6B, as Hugging Face publishes it and as a GGUF.

The numbers are powers of two times short mantissas, which bfloat16 and float16 both hold exactly: whoever reads them
has the same ones.
"""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

LAYERS, D, F, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 28, 1024, 3072, 16, 8, 128, 151936
CONTEXT, THETA, EPS = 40960, 1_000_000, 1e-6

# By the name in a GGUF: the name in safetensors (of a layer), and the shape.
_LAYER = {
    "attn_norm": ("input_layernorm", (D,)),
    "attn_q": ("self_attn.q_proj", (HEADS * HEAD_DIM, D)),
    "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, D)),
    "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, D)),
    "attn_q_norm": ("self_attn.q_norm", (HEAD_DIM,)),
    "attn_k_norm": ("self_attn.k_norm", (HEAD_DIM,)),
    "attn_output": ("self_attn.o_proj", (D, HEADS * HEAD_DIM)),
    "ffn_norm": ("post_attention_layernorm", (D,)),
    "ffn_gate": ("mlp.gate_proj", (F, D)),
    "ffn_up": ("mlp.up_proj", (F, D)),
    "ffn_down": ("mlp.down_proj", (D, F)),
}


def tensors() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Each tensor's name in a GGUF, in safetensors, and its shape."""
    yield "token_embd", "model.embed_tokens", (VOCABULARY, D)
    for layer in range(LAYERS):
        for name, (published, shape) in _LAYER.items():
            yield f"blk.{layer}.{name}", f"model.layers.{layer}.{published}", shape
    yield "output_norm", "model.norm", (D,)


def numbers() -> Iterator[np.ndarray]:
    """The numbers of each tensor, in their order, as the upper halves of float32 (uint16)."""
    random = np.random.default_rng(0)
    for _, _, shape in tensors():
        if len(shape) == 1:
            yield np.full(shape, 0x3F80, np.uint16)  # 1, for the norms
        else:
            # Either sign, from 2**-6 to 2**-5, seven bits after the point.
            yield (random.integers(0, 1 << 16, shape, np.uint16) & 0x807F) | 0x3C80


def write_safetensors(folder: Path) -> None:
    """A folder with a config and one file of bfloat16 tensors."""
    folder.mkdir()
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "rope_theta": THETA,
        "rms_norm_eps": EPS,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for _, name, shape in tensors():
        start, end = end, end + 2 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for array in numbers():
            out.write(array.tobytes())


def write_gguf(path: Path) -> None:
    """The same in float16, norms in float32, without a vocabulary."""
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(D)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(F)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(VOCABULARY)
    for (name, _, shape), halves in zip(tensors(), numbers(), strict=True):
        array = (halves.astype(np.uint32) << 16).view(np.float32)
        writer.add_tensor(f"{name}.weight", array if len(shape) == 1 else array.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
