"""Adapter folder of PEFT as a source: low-rank changes of a model's matrices (LoRA).

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint. A matrix ``NAME.weight [out, in]`` is changed by
``scale * B A``, with ``A [r, in]`` in ``base_model.model.NAME.lora_A.weight`` and ``B [out, r]`` in
``base_model.model.NAME.lora_B.weight``.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jllm_core.adapters import lora_scale
from jllm_core.checkpoint import Box, box_shape

from jllm_convert.errors import ConversionError
from jllm_convert.families.tensor_parts import inside
from jllm_convert.files.model_folder import ModelFolder
from jllm_convert.sources.base import SourceTensor
from jllm_convert.sources.huggingface.safetensors_header import read_safetensors_header, shown
from jllm_convert.sources.huggingface.safetensors_weights import source_tensors

ADAPTER = "adapter"
"""The key of a manifest's source: the adapter that was merged."""

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_PARTS = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
# The text model's layers, beside other parts of a composite model or alone.
_OUTER = re.compile(r"(?:model\.language_model|language_model\.model|model)\.(?=layers\.)|language_model\.(?=lm_head)")
# Names and dots: expressions that repeat nothing are matched in no time.
_PLAIN_PATTERN = re.compile(r"\^?(?:[A-Za-z0-9_.]|\\\.)+")

# What the trained numbers were started from changes nothing, where the model's own weights stayed as published.
_INITIALISERS = (None, True, False, "gaussian", "orthogonal", "eva")
# Fields that change nothing once an adapter is trained, or that its tensors say again.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode"),
    # PEFT sets it to false itself for modules of torch.nn.Linear, and those of these models are all such.
    "fan_in_fan_out",
    *("exclude_modules", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config"),
    *("megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    *("target_modules", "task_type"),
}
_HONOURED = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"}
_UNSUPPORTED = {
    "bias": "biases were trained too",
    "lora_bias": "the factors have biases",
    "modules_to_save": "whole modules were trained beside the factors",
    "use_dora": "DoRA divides each column by its norm",
    "use_qalora": "QA-LoRA averages the inputs of a group",
    "layer_replication": "layers are used several times",
    "trainable_token_indices": "rows of the embedding were trained",
    "target_parameters": "parameters without a module of their own were changed",
    "alora_invocation_tokens": "an activated LoRA counts from certain tokens on",
    "arrow_config": "Arrow mixes several adapters",
}
# Most numbers of a factor that are held at a time, 1 MiB in float64.
_FACTOR_NUMBERS = 1 << 17
# OpenBLAS, which comes with numpy, computes a product of so many multiplications in the thread that asks for it.
_PRODUCTS_AT_ONCE, _TILE_WIDTH = 1 << 18, 256
_OFF: tuple[Any, ...] = (None, False, "none", [], {})


@dataclass(frozen=True)
class _Scaling:
    """How much each change counts, by the fields of adapter_config.json."""

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def expected_rank(self, module: str) -> int:
        return int(_by_pattern(self.ranks, module, self.rank))

    def scale(self, module: str) -> float:
        rank, alpha = self.expected_rank(module), float(_by_pattern(self.alphas, module, self.alpha))
        return lora_scale(alpha, rank, self.rslora)


@dataclass(frozen=True)
class Factors:
    """The two factors of a matrix's change, ``scale * B A``.

    Attributes:
        a: ``[r, in]``.
        b: ``[out, r]``.
        scale: by the fields of adapter_config.json.
        module: the path of the matrix's module, as the adapter names it.
    """

    a: SourceTensor
    b: SourceTensor
    scale: float
    module: str

    @property
    def rank(self) -> int:
        """Rows of ``a`` and columns of ``b``."""
        return self.a.shape[0]

    def change(self) -> SourceTensor:
        """The change ``[out, in]``, which is computed when it is read."""
        read = partial(_product, self.a, self.b, self.scale)
        shape = (self.b.shape[0], self.a.shape[1])
        return SourceTensor(f"{self.module}.lora_B @ lora_A", shape, np.dtype(np.float32), self.a.where, read, "F32")


class AdapterSource:
    """An open folder of an adapter. Headers are read and checked, data are not.

    Args:
        folder: its path.

    Attributes:
        factors: the two factors of each change, by the path of the matrix's module in the Hugging Face text model.
        alpha: that of all modules without one of their own.
        rslora: whether a scale is ``alpha / sqrt(r)`` in place of ``alpha / r``.
        changes: what is added to each matrix ``[out, in]``, float32, by the name that the matrix has in the folder of
            that model. A change is computed when it is read, box by box.

    Raises (on opening):
        ConversionError: no adapter, one of another kind, fields that would change the result and are not honoured, or
            tensors that are damaged, missing or left over.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        if not folder.is_dir():
            raise ConversionError(
                f"{folder} is not a folder; an adapter is one with {ADAPTER_CONFIG}, as PEFT saves it. One that is on "
                "the hub must be downloaded first"
            )
        self._folder = ModelFolder(folder)
        fields = self._folder.read_json(ADAPTER_CONFIG)
        if fields is None:
            raise ConversionError(f"{folder} is not an adapter: it has no {ADAPTER_CONFIG}, which PEFT saves")
        problems: list[str] = []
        scaling = _scaling(fields, problems)
        self._base = fields.get("base_model_name_or_path")
        tensors = self._tensors(problems)
        self.factors: dict[str, Factors] = {}
        self.alpha, self.rslora = (scaling.alpha, scaling.rslora) if scaling is not None else (0.0, False)
        if scaling is not None and not problems:
            self.factors = _factors(tensors, scaling, problems)
        if problems:
            raise ConversionError(problems)
        self.changes: dict[str, SourceTensor] = {f"{name}.weight": each.change() for name, each in self.factors.items()}

    def fingerprint(self) -> str:
        """Hash (SHA-256, in hex) the names, sizes and times of change of its files."""
        found = [file for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if (file := self._folder.file(name)) is not None]
        lines = json.dumps([[file.name, file.size, file.mtime_ns] for file in found])
        return hashlib.sha256(lines.encode()).hexdigest()

    def described(self) -> dict[str, object]:
        """What a manifest's source says of the adapter."""
        base = {"base": self._base} if isinstance(self._base, str) else {}
        return {
            "name": self.path.resolve().name,
            **base,
            "matrices": len(self.changes),
            "fingerprint": self.fingerprint(),
        }

    def _tensors(self, problems: list[str]) -> Mapping[str, SourceTensor]:
        file = self._folder.file(ADAPTER_WEIGHTS)
        if file is None:
            other = sorted(name for name in self._folder.names if name.startswith("adapter_model."))
            there = f"; {other[0]} can run any code when loaded, and so is not read" if other else ""
            problems.append(f"{self.path} has no {ADAPTER_WEIGHTS}{there}: save the adapter with PEFT in safetensors")
            return {}
        stored = {entry.name: (file, entry) for entry in read_safetensors_header(file, problems)}
        return source_tensors(self.path, stored, None, problems)


def _scaling(fields: Mapping[str, Any], problems: list[str]) -> _Scaling | None:
    """The fields that are honoured; problems of all others are added."""
    kind = fields.get("peft_type")
    if kind != "LORA":
        problems.append(f"{ADAPTER_CONFIG}: peft_type {shown(kind)} is not supported; LORA is")
        return None
    for name in sorted(set(fields) - _HARMLESS - _HONOURED):
        value = fields[name]
        # Before known names: a field that is off changes nothing, whatever it would be.
        if any(value is off or (type(value) is type(off) and value == off) for off in _OFF):
            continue
        why = _UNSUPPORTED.get(name, "this version does not know it")
        problems.append(f"{ADAPTER_CONFIG}: {name} is {shown(value)}, which is not supported: {why}")
    start = fields.get("init_lora_weights")
    if not (isinstance(start, bool) or start in _INITIALISERS):
        problems.append(
            f"{ADAPTER_CONFIG}: init_lora_weights is {shown(start)}, which changes the model's own weights before the "
            "training; save the adapter again with PEFT's path_initial_model_for_weight_conversion"
        )
    rank, alpha, rslora = fields.get("r"), fields.get("lora_alpha"), fields.get("use_rslora", False)
    ranks = _pattern(fields, "rank_pattern", problems)
    alphas = _pattern(fields, "alpha_pattern", problems)
    wrong = [f"r must be a whole number from 1 up, got {shown(rank)}"] if not _is_rank(rank) else []
    wrong += [f"lora_alpha must be a number, got {shown(alpha)}"] if not is_number(alpha) else []
    wrong += [f"use_rslora must be true or false, got {shown(rslora)}"] if rslora not in (True, False, None) else []
    wrong += [f"rank_pattern[{shown(k)}] must be a rank, got {shown(v)}" for k, v in ranks.items() if not _is_rank(v)]
    wrong += [
        f"alpha_pattern[{shown(k)}] must be a number, got {shown(v)}" for k, v in alphas.items() if not is_number(v)
    ]
    problems += [f"{ADAPTER_CONFIG}: {problem}" for problem in wrong]
    return None if wrong else _Scaling(int(rank or 0), float(alpha or 0), bool(rslora), ranks, alphas)


def _pattern(fields: Mapping[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    """One of the two fields that give some modules a value of their own."""
    found = fields.get(name) or {}
    if not isinstance(found, dict):
        problems.append(f"{ADAPTER_CONFIG}: {name} must be an object, got {shown(found)}")
        return {}
    # Regular expressions of a stranger may take for ever; the plain names that people write are honoured.
    bad = [key for key in found if not _PLAIN_PATTERN.fullmatch(key)]
    problems += [
        f"{ADAPTER_CONFIG}: {name} has the pattern {shown(key)}; only names of modules are supported, such as "
        "'q_proj' or 'model.layers.0.self_attn.q_proj'"
        for key in bad
    ]
    return found


def _by_pattern(values: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that stands for a module's path, or for its end behind a dot, as in PEFT."""
    return next((value for key, value in values.items() if re.match(rf"(?:.*\.)?(?:{key})$", module)), default)


def _factors(tensors: Mapping[str, SourceTensor], scaling: _Scaling, problems: list[str]) -> dict[str, Factors]:
    """The two factors of each matrix's change, by the matrix's module."""
    found: dict[str, dict[str, SourceTensor]] = {}
    for name, tensor in tensors.items():
        if name.endswith((".base_layer.weight", "embed_tokens.weight")):
            # PEFT adds them where the head or the embedding is adapted or was resized: whether they are still the
            # model's own, only the model can say.
            problems.append(
                f"{ADAPTER_WEIGHTS}: tensor {shown(name)} is a matrix of the model itself, saved beside the factors; "
                "if it is as it was, save the adapter again with save_pretrained(..., save_embedding_layers=False)"
            )
            continue
        match = _PARTS.fullmatch(name.removeprefix(PREFIX))
        if match is None or not name.startswith(PREFIX) or len(tensor.shape) != 2:
            problems.append(
                f"{ADAPTER_WEIGHTS}: tensor {shown(name)} ({list(tensor.shape)}) is not a factor of a matrix; expected "
                f"{PREFIX}NAME.lora_A.weight [r, in] and {PREFIX}NAME.lora_B.weight [out, r]"
            )
            continue
        found.setdefault(match["module"], {})[match["part"]] = tensor
    factors: dict[str, Factors] = {}
    for module, parts in found.items():
        if missing := {"A", "B"} - set(parts):
            problems.append(f"{ADAPTER_WEIGHTS}: lora_{missing.pop()} of {shown(module)} is missing")
            continue
        a, b, rank = parts["A"], parts["B"], scaling.expected_rank(module)
        if not (a.shape[0] == b.shape[1] == rank):
            problems.append(
                f"{ADAPTER_WEIGHTS}: the factors of {shown(module)} are {list(a.shape)} and {list(b.shape)}, "
                f"{ADAPTER_CONFIG} says that their rank is {rank}"
            )
            continue
        factors[_text_name(module)] = Factors(a, b, scaling.scale(module), module)
    if not found and not problems:
        problems.append(f"{ADAPTER_WEIGHTS} has no tensors")
    return factors


def _product(a: SourceTensor, b: SourceTensor, scale: float, box: Box) -> np.ndarray:
    """A box of ``scale * B A``, float32, each number of which is the same in whatever boxes the product is read.

    Parts of the factors are read anew for each box: little memory is needed beside the result.
    """
    rows, columns = box
    rank, result = a.shape[0], np.empty(box_shape(box), np.float32)
    size = max(_FACTOR_NUMBERS // rank, 1)
    # Not finite is a number of a damaged factor, or one too large for float32; who reads the result looks for them.
    with np.errstate(invalid="ignore", over="ignore"):
        for across in _tiles(columns.start, columns.stop, size):
            right = _on_grid(a.read((slice(0, rank), across)), axis=0)
            for down in _tiles(rows.start, rows.stop, size):
                left = _on_grid(b.read((down, slice(0, rank))), axis=1)
                _multiply(left, right, scale, result[inside((down, across), box)])
    return result


def _multiply(left: np.ndarray, right: np.ndarray, scale: float, out: np.ndarray) -> None:
    # In tiles that a library does not share among threads of its own: jobs run in threads already, and those of one
    # product would wait for one another.
    height = max(_PRODUCTS_AT_ONCE // (len(right) * _TILE_WIDTH), 1)
    for across in _tiles(0, right.shape[1], _TILE_WIDTH):
        for down in _tiles(0, len(left), height):
            tile = left[down] @ right[:, across]
            tile *= scale
            out[down, across] = tile


def _on_grid(factor: np.ndarray, axis: int) -> np.ndarray:
    """A factor in float64, rounded so that the sums of its products are exact, and so the same in any order.

    In which order a matrix product is summed depends on its shape, the library and the processor. Along ``axis``, which
    the sum is over, the numbers become whole ones of at most ``bits`` bits, times a power of two: the products of two
    such factors and all of their sums then fit in the 53 bits of a float64. Up to rank 64 the numbers keep at least 23
    bits of the largest, as many as float32 has.
    """
    bits = (53 - (factor.shape[axis] - 1).bit_length()) // 2
    exact = factor.astype(np.float64)
    _, exponent = np.frexp(np.abs(exact).max(axis, keepdims=True))
    unit = np.ldexp(1.0, exponent - bits)
    exact /= unit
    np.rint(exact, out=exact)
    exact *= unit
    return exact


def _tiles(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _text_name(module: str) -> str:
    """A module's path as in a folder of the text model alone."""
    found = _OUTER.match(module)
    if found is None:
        return module
    rest = module[found.end() :]
    return rest if rest.startswith("lm_head") else f"model.{rest}"


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def is_number(value: Any) -> bool:
    """Whether this is a finite number of a size that adapters have."""
    # Whole numbers of JSON may be larger than any float.
    return type(value) in (int, float) and abs(value) < 1e9
