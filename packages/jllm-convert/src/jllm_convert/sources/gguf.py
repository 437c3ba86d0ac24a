"""A GGUF file: architecture from its metadata, tensors dequantised when they are read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The ``gguf`` package reads and dequantises.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jllm_core.config import ConfigError, ModelConfig, MoEConfig, RopeScaling

from jllm_convert.errors import ConversionError
from jllm_convert.families import FAMILIES
from jllm_convert.gguf_tokenizer import tokenizer_files
from jllm_convert.sources.base import Box, SourceTensor

# Metadata under the architecture's own name that the config reader takes up, or that changes nothing.
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
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
}
_MOE = {"expert_count", "expert_used_count", "expert_feed_forward_length"}
_ROPE_FACTORS = "rope_freqs.weight"
# Types that the gguf package does not dequantise, or that hold no weights.
_NOT_WEIGHTS = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K", "Q1_0")


class GGUFSource:
    """A GGUF file, opened: its header is read and checked, its data are not.

    Raises (on opening):
        ConversionError: not a GGUF file, cut short, split in parts, or of an architecture that is not supported.
    """

    naming = "gguf"

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path
        try:
            reader = GGUFReader(path)
            self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
            raise ConversionError(
                f"{path} cannot be read as a GGUF file ({type(error).__name__}: {error}); it may be cut short or of "
                "another format, download it again"
            ) from error
        if self.metadata.get("split.count", 1) > 1:
            raise ConversionError(
                f"{path} is one of {self.metadata['split.count']} parts; join them first: llama-gguf-split --merge"
            )
        self.architecture = self.metadata.get("general.architecture")
        known = {family.gguf_architecture: family for family in FAMILIES.values() if family.gguf_architecture}
        if self.architecture not in known:
            raise ConversionError(
                f"{path.name}: architecture {self.architecture!r} is not supported; "
                f"supported: {', '.join(sorted(known))}"
            )
        self._family = known[self.architecture]
        self.tensors: Mapping[str, SourceTensor] = self._tensors(reader)

    def _tensors(self, reader: Any) -> dict[str, SourceTensor]:
        size = self.path.stat().st_size
        problems, tensors = [], {}
        for tensor in reader.tensors:
            if tensor.tensor_type.name in _NOT_WEIGHTS:
                problems.append(f"{self.path.name}: tensor {tensor.name!r} is of type {tensor.tensor_type.name}")
            end = tensor.data_offset + tensor.n_bytes
            if end > size:
                problems.append(f"{self.path.name}: tensor {tensor.name!r} ends at byte {end:,}, the file has {size:,}")
            shape = tuple(int(length) for length in reversed(tensor.shape.tolist()))
            read = partial(_dequantised, tensor)
            tensors[tensor.name] = SourceTensor(
                tensor.name, shape, _dtype(tensor), self.path, read, str(tensor.tensor_type.name)
            )
        if problems:
            raise ConversionError(problems)
        return tensors

    def config(self) -> ModelConfig:
        """The normalised architecture."""
        where, known = self.path.name, {}
        prefix = f"{self.architecture}."
        known = {k.removeprefix(prefix): v for k, v in self.metadata.items() if k.startswith(prefix)}
        problems = [
            f"{where}: metadata {prefix}{name} = {value!r} is not known to this version and may change the maths"
            for name, value in known.items()
            if name not in _KNOWN | (_MOE if self._family.moe else set())
        ]
        sizes: dict[str, Any] = {}
        for name, ours in _SIZES.items():
            if not isinstance(known.get(name), int):
                problems.append(f"{where}: metadata {prefix}{name} must be a whole number, got {known.get(name)!r}")
            sizes[ours] = known.get(name)
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            problems.append(f"{where}: tensor 'token_embd.weight' is missing or is not a matrix")
        if problems or embedding is None:
            raise ConversionError(problems)

        head_dim = known.get("attention.key_length", sizes["hidden_size"] // max(sizes["num_heads"], 1))
        for name in ("attention.value_length", "rope.dimension_count"):
            if known.get(name, head_dim) != head_dim:
                raise ConversionError(
                    f"{where}: {prefix}{name} is {known[name]}, only the head's own width {head_dim} is supported"
                )
        try:
            return ModelConfig(
                model_type=self._family.model_type,
                vocab_size=embedding.shape[0],
                **sizes,
                num_kv_heads=known.get("attention.head_count_kv", sizes["num_heads"]),
                head_dim=head_dim,
                rms_norm_eps=_shortest(known.get("attention.layer_norm_rms_epsilon", 1e-6)),
                rope_theta=_shortest(known.get("rope.freq_base", 10000.0)),
                rope_scaling=self._rope_scaling(known),
                moe=self._moe(known),
                rope_layers=self._rope_layers(sizes["num_layers"]),
                tie_embeddings="output.weight" not in self.tensors,
                qkv_bias="blk.0.attn_q.bias" in self.tensors,
                o_bias="blk.0.attn_output.bias" in self.tensors,
                mlp_bias="blk.0.ffn_gate.bias" in self.tensors,
                qk_norm=self._family.qk_norm,
            )
        except ConfigError as error:
            raise ConversionError(f"{where}: {error}") from error

    def _rope_scaling(self, known: Mapping[str, Any]) -> RopeScaling | None:
        # A factor without a type is the older way to say linear.
        kind = known.get("rope.scaling.type", "linear" if "rope.scaling.factor" in known else "none")
        if kind not in ("none", "linear", "yarn"):
            raise ConversionError(
                f"{self.path.name}: rope type {kind!r} is not supported; supported: none, linear, yarn"
            )
        if kind == "yarn":
            return self._yarn(known)
        if _ROPE_FACTORS not in self.tensors:
            factor = _shortest(known.get("rope.scaling.factor", 1.0))
            return RopeScaling(kind="linear", factor=factor) if kind == "linear" else None
        if kind == "linear":
            raise ConversionError(
                f"{self.path.name}: both linear rope scaling and {_ROPE_FACTORS!r}, which is not known"
            )
        factors = self.tensors[_ROPE_FACTORS].read().astype(np.float32)
        return RopeScaling(kind="factors", factors=tuple(float(factor) for factor in factors))

    def _yarn(self, known: Mapping[str, Any]) -> RopeScaling:
        factor, original = known.get("rope.scaling.factor"), known.get("rope.scaling.original_context_length")
        if factor is None or original is None or _ROPE_FACTORS in self.tensors:
            raise ConversionError(
                f"{self.path.name}: rope type 'yarn' needs rope.scaling.factor and "
                f"rope.scaling.original_context_length, and no {_ROPE_FACTORS!r}; got {factor!r} and {original!r}"
            )
        factor = _shortest(factor)
        # llama.cpp, too, derives it from the factor where the file states none.
        return RopeScaling(
            kind="yarn",
            factor=factor,
            original_context_length=original,
            attention_factor=0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0,
        )

    def _moe(self, known: Mapping[str, Any]) -> MoEConfig | None:
        if not self._family.moe:
            return None
        # llama.cpp has a mixture in every layer of this architecture, and always scales the weights to sum to one.
        return MoEConfig(
            num_experts=known.get("expert_count", 0),
            experts_per_token=known.get("expert_used_count", 0),
            intermediate_size=known.get("expert_feed_forward_length", 0),
        )

    def _rope_layers(self, num_layers: int) -> tuple[bool, ...] | None:
        if not self._family.skips_rope:
            return None
        # The file does not say; llama.cpp leaves the rotation out of every fourth layer, as the published models do.
        rotated = tuple((layer + 1) % 4 != 0 for layer in range(num_layers))
        return None if all(rotated) else rotated

    def generation_config(self) -> dict[str, object]:
        """The ids that end a text."""
        names = ("eos_token_id", "eot_token_id", "eom_token_id")
        ids = {self.metadata.get(f"tokenizer.ggml.{name}") for name in names}
        return {"eos_token_id": sorted(token for token in ids if isinstance(token, int))}

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Rebuild the tokenizer from the metadata and write its files."""
        files = tokenizer_files(self.metadata) or {}
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return list(files)


def _dtype(tensor: Any) -> np.dtype:
    """The element type that a tensor is read as: its own if it is a plain one, else float32."""
    plain: dict[str, np.dtype] = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
    return plain.get(str(tensor.tensor_type.name), np.dtype(np.float32))


def _dequantised(tensor: Any, box: Box) -> np.ndarray:
    from gguf import dequantize

    values: np.ndarray = dequantize(tensor.data, tensor.tensor_type)
    return values[box].astype(_dtype(tensor), copy=False)


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: GGUF keeps 1e-05 as 9.999999747378752e-06."""
    return float(str(np.float32(value)))
