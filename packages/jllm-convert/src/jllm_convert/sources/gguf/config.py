"""Reader of GGUF metadata into a ModelConfig."""

import math
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from jllm_core.config import ConfigError, ModelConfig, MoEConfig, RopeScaling

from jllm_convert.errors import ConversionError
from jllm_convert.families.table import Family
from jllm_convert.sources.base import SourceTensor
from jllm_convert.sources.gguf.numbers import Numbers
from jllm_convert.sources.gguf.recurrent_layers import DELTA_NET_KEYS, read_delta_net, read_mixers

# Metadata keys below the architecture's name that are read here, or that change nothing.
_SIZES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_layers",
    "attention.head_count": "num_heads",
    "context_length": "context_length",
}
_KNOWN = {
    *_SIZES,
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size"),
    *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count"),
    "nextn_predict_layers",
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_ext_factor"),
}
# Metadata that state what these architectures are anyway, and factors at the values that change nothing.
_NO_EFFECT = {
    "attention.causal": (True,),
    "tensor_data_layout": ("Meta AI original pth",),
    **dict.fromkeys(("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"), (1,)),
    "rope.scaling.yarn_log_multiplier": (0,),
}
_MOE = {"expert_count", "expert_used_count", "expert_feed_forward_length"}
_SHARED = {"expert_shared_feed_forward_length"}
_MROPE = {"rope.dimension_sections", "n_deepstack_layers"}  # of images, and how positions of these are laid out
_PREDICTION = "nextn_predict_layers"
ROPE_FACTORS = "rope_freqs.weight"
_MAX_HEAD_DIM = 1 << 16  # so that the rotary factors, which the config holds, are few


def read_gguf_config(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, SourceTensor],
    family: Family,
    where: str,
    ignored: Collection[str] = (),
) -> ModelConfig:
    """Read the normalised architecture of a GGUF file of a known family.

    Args:
        metadata: the file's metadata; a value may be of any type.
        tensors: its tensors. Their shapes and presence say what the metadata does not.
        family: the family of ``general.architecture``.
        where: the file's name, for error messages.
        ignored: keys of metadata that are not known here, and that change nothing, as the user says.

    Raises:
        ConversionError: metadata that is unknown, missing or of the wrong type, or an impossible config.
    """
    prefix = f"{family.gguf_architecture}."
    known = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    embedding = tensors.get("token_embd.weight")
    readable = _KNOWN | (_MOE if family.moe else set()) | (_SHARED if family.shared_expert else set())
    readable |= (_MROPE if family.rope_fields else set()) | (DELTA_NET_KEYS if family.delta_nets else set())
    stated = _NO_EFFECT | _stated(family)
    # As in config.json: what is off or empty asks for nothing.
    problems = [
        f"{where}: metadata {prefix}{name} = {reprlib.repr(value)} is not known to this version and may change the "
        f"maths; if it does not, convert with --ignore-field {prefix}{name} (jllm-convert convert)"
        for name, value in known.items()
        if name not in readable and value not in stated.get(name, (False, "", [])) and prefix + name not in ignored
    ]
    problems += [
        f"{where}: there is no metadata {key} that could be ignored"
        for key in ignored
        if key.removeprefix(prefix) not in known.keys() - readable
    ]
    sizes = {ours: known.get(name) for name, ours in _SIZES.items()}
    if family.moe and sizes["intermediate_size"] is None:
        sizes["intermediate_size"] = known.get("expert_feed_forward_length")  # no layer is without experts
    if type(sizes["num_layers"]) is int and (guesses := _prediction_layers(known)):
        sizes["num_layers"] -= guesses
    problems += [
        f"{where}: metadata {prefix}{name} must be a whole number, got {reprlib.repr(sizes[ours])}"
        for name, ours in _SIZES.items()
        if type(sizes[ours]) is not int
    ]
    layers = sizes["num_layers"]
    # Every layer has tensors. Checked before anything is made for each layer.
    if type(layers) is int and layers > len(tensors):
        problems.append(f"{where}: metadata {prefix}block_count is {layers}, the file has only {len(tensors)} tensors")
    if embedding is None or len(embedding.shape) != 2:
        problems.append(f"{where}: tensor 'token_embd.weight' is missing or is not a matrix")
    if problems or embedding is None:
        raise ConversionError(problems)
    try:
        return _config(Numbers(known, f"{where}: {prefix}"), sizes, embedding.shape[0], tensors, family)
    except ConfigError as error:
        raise ConversionError(f"{where}: {error}") from error


def _stated(family: Family) -> dict[str, tuple[Any, ...]]:
    """Metadata that this family's files may state, at the value that llama.cpp takes anyway."""
    softmax, shared = 1, {"expert_shared_count": (1,)} if family.shared_expert else {}
    routing = {"expert_gating_func": (softmax,), "expert_weights_norm": (family.gguf_normalizes,)}
    return {**routing, **shared} if family.moe else {}


def prediction_tensors(metadata: Mapping[str, Any], names: Collection[str], architecture: str) -> set[str]:
    """The names of the blocks behind the last layer, which guess further tokens. A file counts them as layers."""
    known = {key: metadata.get(f"{architecture}.{key}") for key in ("block_count", _PREDICTION)}
    layers, guesses = known["block_count"], _prediction_layers(known)
    if type(layers) is not int or not guesses:
        return set()
    prefixes = tuple(f"blk.{layer}." for layer in range(layers - guesses, layers))
    return {name for name in names if name.startswith(prefixes)}


def _prediction_layers(known: Mapping[str, Any]) -> int:
    """How many of the blocks there are; none where the metadata do not say a possible number."""
    guesses, layers = known.get(_PREDICTION), known.get("block_count")
    return guesses if type(guesses) is int and type(layers) is int and 0 < guesses < min(layers, 100) else 0


def _config(
    numbers: Numbers, sizes: Mapping[str, Any], vocabulary: int, tensors: Mapping[str, SourceTensor], family: Family
) -> ModelConfig:
    head_dim = numbers.size("attention.key_length", sizes["hidden_size"] // max(sizes["num_heads"], 1))
    rotated = numbers.size("rope.dimension_count", int(head_dim * (family.rotary_factor or 1)))
    for name in ("attention.value_length", *(() if family.rotary_factor else ("rope.dimension_count",))):
        if numbers.known.get(name, head_dim) != head_dim:
            got = reprlib.repr(numbers.known[name])
            raise ConversionError(f"{numbers.where}{name} is {got}, only the head's own width {head_dim} is supported")
    mixers = read_mixers(numbers, sizes["num_layers"]) if family.delta_nets else None
    return ModelConfig(
        model_type=family.model_type,
        # The embedding's rows: vocab_size is missing in many files, and may differ from the padded embedding.
        vocab_size=vocabulary,
        **sizes,
        num_kv_heads=numbers.size("attention.head_count_kv", sizes["num_heads"]),
        head_dim=head_dim,
        rms_norm_eps=numbers.number("attention.layer_norm_rms_epsilon", 1e-6),
        rope_theta=numbers.number("rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(numbers, tensors.get(ROPE_FACTORS), rotated),
        moe=_moe(numbers, family) if family.moe else None,
        rope_layers=_rope_layers(sizes["num_layers"]) if family.skips_rope else None,
        # What the metadata does not say, the tensors do.
        tie_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm=family.qk_norm,
        rotary_dim=None if rotated == head_dim else rotated,
        output_gate=family.output_gate,
        centered_norm=family.centered_norm,
        mixers=mixers,
        delta_net=None if mixers is None else read_delta_net(numbers),
    )


def _rope_scaling(numbers: Numbers, factors: SourceTensor | None, head_dim: int) -> RopeScaling | None:
    known = numbers.known
    # Older files state a factor without a type; it means linear.
    kind = known.get("rope.scaling.type", "linear" if "rope.scaling.factor" in known else "none")
    if kind not in ("none", "linear", "yarn"):
        raise ConversionError(
            f"{numbers.where}rope.scaling.type: rope type {reprlib.repr(kind)} is not supported; "
            "supported: none, linear, yarn"
        )
    if kind != "none" and factors is not None:
        raise ConversionError(f"{numbers.where}rope.scaling.type is {kind!r}, with {ROPE_FACTORS!r} that is not known")
    # How much of YaRN's blend there is. Below zero, llama.cpp's default, it goes by the type.
    blend = numbers.number("rope.scaling.yarn_ext_factor", -1.0)
    whole = float(kind == "yarn")
    if blend >= 0 and blend != whole:
        raise numbers.fail("rope.scaling.yarn_ext_factor", f"{whole} for rope type {kind!r}, or below zero")
    if kind == "yarn":
        return _yarn(numbers)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=numbers.number("rope.scaling.factor", 1.0))
    return None if factors is None else _factors(factors, head_dim)


def _factors(tensor: SourceTensor, head_dim: int) -> RopeScaling:
    if tensor.shape != (head_dim // 2,) or head_dim > _MAX_HEAD_DIM:
        raise ConversionError(
            f"{tensor.where.name}: tensor {tensor.name!r} has {' x '.join(map(str, tensor.shape))} factors, "
            f"head_dim {head_dim} needs {head_dim // 2}, and at most {_MAX_HEAD_DIM // 2} are supported"
        )
    factors = tensor.read().astype(np.float32)
    if not np.isfinite(factors).all():
        raise ConversionError(f"{tensor.where.name}: tensor {tensor.name!r} has factors that are infinite or no number")
    return RopeScaling(kind="factors", factors=tuple(factors.tolist()))


def _yarn(numbers: Numbers) -> RopeScaling:
    missing = [name for name in ("factor", "original_context_length") if f"rope.scaling.{name}" not in numbers.known]
    if missing:
        names = " and ".join(f"rope.scaling.{name}" for name in missing)
        raise ConversionError(f"{numbers.where}rope.scaling.type: rope type 'yarn' needs {names}, got nothing")
    factor = numbers.number("rope.scaling.factor")
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context_length=numbers.size("rope.scaling.original_context_length", 0),
        beta_fast=numbers.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=numbers.number("rope.scaling.yarn_beta_slow", 1.0),
        # The same formula as llama.cpp, which files with no attention factor rely on.
        attention_factor=0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0,
    )


def _moe(numbers: Numbers, family: Family) -> MoEConfig:
    # llama.cpp has a mixture in every layer of these architectures.
    return MoEConfig(
        num_experts=numbers.size("expert_count", 0),
        experts_per_token=numbers.size("expert_used_count", 0),
        intermediate_size=numbers.size("expert_feed_forward_length", 0),
        normalize_weights=family.gguf_normalizes,
        shared_size=numbers.size("expert_shared_feed_forward_length", 0) if family.shared_expert else None,
        shared_gate=family.shared_expert,
    )


def _rope_layers(num_layers: int) -> tuple[bool, ...] | None:
    # The file does not say it: llama.cpp hard-codes that every fourth layer has no RoPE, like the published models.
    rotated = tuple((layer + 1) % 4 != 0 for layer in range(num_layers))
    return None if all(rotated) else rotated
