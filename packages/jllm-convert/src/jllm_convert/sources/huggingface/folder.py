"""Hugging Face model folder as a source: config.json, safetensors (one file, or an index and shards), tokenizer."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jllm_core.config import ModelConfig

from jllm_convert.errors import ConversionError
from jllm_convert.families import family_of
from jllm_convert.files.model_folder import (
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    PICKLE_SUFFIXES,
    SINGLE_FILE,
    ModelFolder,
    files_without_index,
    tokenizer_file_names,
)
from jllm_convert.files.regular_file import RegularFile
from jllm_convert.sources.base import SourceTensor
from jllm_convert.sources.huggingface.config import read_hf_config
from jllm_convert.sources.huggingface.config_fields import GENERATION_SETTINGS
from jllm_convert.sources.huggingface.safetensors_header import Entry, read_safetensors_header, shown
from jllm_convert.sources.huggingface.safetensors_weights import source_tensors
from jllm_convert.sources.huggingface.text_config import text_fields
from jllm_convert.sources.left_out import counted, left_out_names
from jllm_convert.sources.quantized.quantization_config import read_quantization

_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")


class SafetensorsSource:
    """An open Hugging Face folder. Headers are read and checked, data are not.

    Args:
        folder: its path.
        ignored: fields of config.json that this version does not know, and that change nothing, as the user says.

    Raises (on opening):
        ConversionError: the folder has no model, or files that are damaged or missing, weights of a type that is not
            supported, or links that lead out of it.
    """

    naming = "hf"

    def __init__(self, folder: Path, ignored: Sequence[str] = ()) -> None:
        self.path = folder
        self._ignored = ignored
        self._folder = ModelFolder(folder)
        fields = self._folder.read_json(CONFIG_FILE)
        if fields is None:
            raise ConversionError(
                f"{folder} is not a model folder: it has no config.json. "
                "Expected a Hugging Face folder with config.json and *.safetensors, or a .gguf file"
            )
        self._fields: dict[str, Any] = fields
        self._text = text_fields(fields, CONFIG_FILE)[0]  # ``config`` raises its problems
        problems: list[str] = []
        self._weight_files: tuple[str, ...] = ()
        stored = self._stored(problems)
        left_out = left_out_names(stored, family_of(fields.get("model_type")))
        self.left_out: Mapping[str, int] = counted(left_out)
        stored = {name: each for name, each in stored.items() if name not in left_out}
        for name in (GENERATION_FILE, *tokenizer_file_names(folder)):
            self._find(name, problems)  # read later; a bad one must be reported before the work starts
        block, unsupported = read_quantization(self._text, CONFIG_FILE)
        # A kind of quantisation that is not supported is one problem, not one for each tensor.
        self.tensors: Mapping[str, SourceTensor] = (
            {} if unsupported else _with_prefix(source_tensors(folder, stored, block, problems))
        )
        if unsupported or problems:
            raise ConversionError(unsupported + problems)

    def config(self) -> ModelConfig:
        """Read the normalised architecture."""
        return read_hf_config(self._fields, CONFIG_FILE, self._ignored)

    def generation_config(self) -> dict[str, object]:
        """Read generation_config.json, and add the end-of-text ids of config.json to its own.

        Without that file the settings are those that config.json has, as in transformers.
        """
        settings = self._folder.read_json(GENERATION_FILE)
        if settings is None:
            kept = {name: self._text.get(name) for name in GENERATION_SETTINGS}
            settings = {name: value for name, value in kept.items() if value is not None}
        ids: set[int] = set()
        for where, fields in ((GENERATION_FILE, settings), (CONFIG_FILE, self._text)):
            value = fields.get("eos_token_id")
            several = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(token) is int for token in several):
                raise ConversionError(f"{where}: eos_token_id must be a token id or a list of them, got {shown(value)}")
            # Publishers put them in either file, and sometimes different ones in both.
            ids |= set(several)
        return {**settings, "eos_token_id": sorted(ids)}

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Copy the tokenizer files that exist; return their names."""
        names = [name for name in tokenizer_file_names(self.path) if self._folder.file(name) is not None]
        if "tokenizer.json" not in names:
            return []  # the other files mean nothing without it
        for name in names:
            self._folder.copy(name, folder / name)
        return names

    def fingerprint(self) -> str:
        """Hash (SHA-256) the name, size and time of change of every file that a conversion reads."""
        # Names without the folder: a folder that is moved is still the same source.
        tokenizer = tokenizer_file_names(self.path)
        names = (*self._weight_files, INDEX_FILE, CONFIG_FILE, GENERATION_FILE, *tokenizer)
        found = [file for name in names if (file := self._folder.file(name)) is not None]
        lines = json.dumps([[file.name, file.size, file.mtime_ns] for file in found])
        return hashlib.sha256(lines.encode()).hexdigest()

    def _stored(self, problems: list[str]) -> dict[str, tuple[RegularFile, Entry]]:
        """Every tensor in the folder's weight files, by name."""
        stored: dict[str, tuple[RegularFile, Entry]] = {}
        files = self._files(problems)
        self._weight_files = tuple(sorted(files))  # for the fingerprint
        for name, expected in files.items():
            known = len(problems)
            file = self._find(name, problems)
            if file is None:
                if len(problems) == known:
                    problems.append(f"{name}: the file is missing from {self.path}; download it again")
                continue
            found = read_safetensors_header(file, problems)
            for entry in found:
                if entry.name in stored:
                    problems.append(f"{name}: tensor {shown(entry.name)} is also in {stored[entry.name][0].name}")
                stored[entry.name] = (file, entry)
            # A damaged header is one problem: its tensors are not compared with the index.
            if expected is not None and len(problems) == known:
                problems += _index_problems(name, expected, {entry.name for entry in found})
        return stored

    def _find(self, name: str, problems: list[str]) -> RegularFile | None:
        """Find a file; None where it is missing, or may not be used, which is added to ``problems``."""
        try:
            return self._folder.file(name)
        except ConversionError as error:
            problems += error.problems
            return None

    def _files(self, problems: list[str]) -> dict[str, set[str] | None]:
        """The folder's weight files, each with the tensors that the index puts in it (None without an index)."""
        single = SINGLE_FILE in self._folder.names
        index = self._folder.read_json(INDEX_FILE)
        if index is None:
            return dict.fromkeys(self._files_without_index())
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConversionError(f"{self.path / INDEX_FILE} has no weight_map")
        files: dict[str, set[str] | None] = {}
        for tensor, name in weight_map.items():
            if not _is_plain(name):
                problems.append(
                    f"{INDEX_FILE}: tensor {shown(tensor)} is put in {shown(name)}, which is not a plain file name"
                )
                continue
            expected = files.setdefault(name, set())
            if expected is not None:
                expected.add(tensor)
        # Which of the two is the model, nobody can say.
        if single and SINGLE_FILE not in files:
            problems.append(
                f"{self.path} holds {SINGLE_FILE}, and {INDEX_FILE} which has the weights in other files; "
                "remove one or the other"
            )
        return files

    def _files_without_index(self) -> list[str]:
        names = files_without_index(self._folder.names)
        if not names:
            raise ConversionError(f"{self.path} holds no safetensors weights: {self._advice()}")
        # One sentence: the number of them is a stranger's.
        if missing := [name for name in names if name not in self._folder.names]:
            raise ConversionError(
                f"{self.path} lacks {len(missing):,} of {len(names):,} shards, such as {missing[0]}; download them "
                "again"
            )
        return names

    def _advice(self) -> str:
        """Advice for a folder without safetensors."""
        pickled = sorted(name for name in self._folder.names if name.endswith((*PICKLE_SUFFIXES, ".bin.index.json")))
        if not pickled:
            return f"expected {SINGLE_FILE}, or {INDEX_FILE} and its shards"
        return (
            f"{', '.join(pickled)} can run any code when loaded, and so is not read; "
            "ask the publisher for safetensors, or convert with transformers' save_pretrained"
        )


def _with_prefix(tensors: Mapping[str, SourceTensor]) -> Mapping[str, SourceTensor]:
    """Tensors by the names that those of a text model alone have.

    Beside a vision encoder they have a longer prefix, and none where a model was saved without its head.
    """
    prefix = next((each for each in _PREFIXES if f"{each}embed_tokens.weight" in tensors), "model.")
    if prefix == "model." or (not prefix and any(name.startswith("model.") for name in tensors)):
        return tensors
    renamed = {_text_name(name, prefix): tensor for name, tensor in tensors.items()}
    # Two by one name: both are left as they are, and reported. The tensors keep the files' own names, for messages.
    return renamed if len(renamed) == len(tensors) else tensors


def _text_name(name: str, prefix: str) -> str:
    if (head := name.removeprefix("language_model.")).startswith("lm_head."):
        return head
    return f"model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name


def _is_plain(name: Any) -> bool:
    """Whether a value of an index is a plain file name, without a path."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and name not in ("", ".", "..")
        and not set(name) & {"/", "\\", ":"}
        and len(name) <= 255
    )


def _index_problems(name: str, expected: set[str], found: set[str]) -> Iterator[str]:
    """Problems of a file that holds other tensors than the index says."""
    for tensor in sorted(expected - found):
        yield f"{name}: the index puts tensor {shown(tensor)} here, it is not"
    for tensor in sorted(found - expected):
        yield f"{name}: tensor {shown(tensor)} is here, the index does not say so; download the index and this again"
