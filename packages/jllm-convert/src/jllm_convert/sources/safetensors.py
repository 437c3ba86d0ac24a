"""A Hugging Face folder: config.json, safetensors in one file or in shards with an index, tokenizer files."""

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jllm_core.config import ModelConfig

from jllm_convert.errors import ConversionError
from jllm_convert.hf_config import read_hf_config
from jllm_convert.sources.base import Box, SourceTensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# safetensors' own names of the element types that can become weights.
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


class SafetensorsSource:
    """A Hugging Face folder, opened: headers are read and checked, data are not.

    Raises (on opening):
        ConversionError: the folder holds no model, or files that are damaged, missing or not readable as weights.
    """

    naming = "hf"

    def __init__(self, folder: Path) -> None:
        self.path = folder
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise ConversionError(
                f"{folder} is not a model folder: it has no config.json. "
                "Expected a Hugging Face folder with config.json and *.safetensors, or a .gguf file"
            )
        self._fields = _read_json(config_file)
        self.tensors: Mapping[str, SourceTensor] = self._open_tensors()

    def config(self) -> ModelConfig:
        """The normalised architecture."""
        return read_hf_config(self._fields, "config.json")

    def fingerprint(self) -> str:
        return "|".join(
            f"{t.where} {t.where.stat().st_mtime_ns} {t.where.stat().st_size}" for t in self.tensors.values()
        )

    def generation_config(self) -> dict[str, object]:
        """generation_config.json, with the end-of-text ids of config.json added to its own."""
        path = self.path / "generation_config.json"
        settings = _read_json(path) if path.is_file() else {}
        ids: list[int] = []
        for value in (settings.get("eos_token_id"), self._fields.get("eos_token_id")):
            ids += [value] if isinstance(value, int) else list(value or ())
        return {**settings, "eos_token_id": sorted(set(ids))}

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Copy the tokenizer files that are there."""
        names = [name for name in TOKENIZER_FILES if (self.path / name).is_file()]
        if "tokenizer.json" not in names:
            return []
        for name in names:
            shutil.copyfile(self.path / name, folder / name)
        return names

    def _open_tensors(self) -> dict[str, SourceTensor]:
        problems: list[str] = []
        tensors: dict[str, SourceTensor] = {}
        for name, expected in self._files(problems).items():
            path = self.path / name
            found = _headers(path, problems)
            for tensor in found:
                if tensor.name in tensors:
                    problems.append(f"{name}: tensor {tensor.name!r} is also in {tensors[tensor.name].where.name}")
                tensors[tensor.name] = tensor
            if expected is not None and path.is_file():
                missing = expected - {tensor.name for tensor in found}
                problems += [f"{name}: the index puts tensor {each!r} here, it is not" for each in sorted(missing)]
        if problems:
            raise ConversionError(problems)
        return tensors

    def _files(self, problems: list[str]) -> dict[str, set[str] | None]:
        """The folder's weight files, each with the tensors that the index puts in it (None without an index)."""
        index = self.path / INDEX_FILE
        if index.is_file():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ConversionError(f"{index} has no weight_map")
            files: dict[str, set[str] | None] = {}
            for tensor, name in weight_map.items():
                if not isinstance(name, str) or Path(name).name != name:
                    problems.append(
                        f"{INDEX_FILE}: tensor {tensor!r} is put in {name!r}, which is not a plain file name"
                    )
                    continue
                expected = files.setdefault(name, set())
                if expected is not None:
                    expected.add(tensor)
            return files
        if (self.path / SINGLE_FILE).is_file():
            return {SINGLE_FILE: None}
        pickled = sorted(p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        advice = (
            f"{', '.join(pickled)} can run any code when loaded, and so is not read; "
            "ask the publisher for safetensors, or convert with transformers' save_pretrained"
            if pickled
            else f"expected {SINGLE_FILE}, or {INDEX_FILE} and its shards"
        )
        raise ConversionError(f"{self.path} holds no safetensors weights: {advice}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConversionError(f"{path} must hold a JSON object, got {type(fields).__name__}")
    return fields


def _headers(path: Path, problems: list[str]) -> list[SourceTensor]:
    """The tensors of one file. What is wrong with it goes to ``problems``."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        problems.append(f"{path.name}: the file is missing from {path.parent}; download it again")
        return []
    tensors = []
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict: it cannot be iterated)
                part = file.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    problems.append(
                        f"{path.name}: tensor {name!r} is stored as {part.get_dtype()}; supported: {', '.join(_DTYPES)}"
                    )
                    continue
                tensors.append(
                    SourceTensor(
                        name, tuple(part.get_shape()), dtype, path, partial(_read_tensor, path, name), part.get_dtype()
                    )
                )
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        problems.append(
            f"{path.name}: not a whole safetensors file ({error}; {size:,} bytes on disk); it may be cut short, "
            "download it again"
        )
    return tensors


def _read_tensor(path: Path, name: str, box: Box) -> np.ndarray:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        part: np.ndarray = np.ascontiguousarray(file.get_tensor(name)[box])
        return part
