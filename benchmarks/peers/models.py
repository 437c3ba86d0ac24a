"""The weights that the contenders load: the same numbers, in each one's format. Made once, and kept in a folder."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.cases import JLLM, LLAMA, Contender
from benchmarks.peers.processes import ask
from benchmarks.peers.random_model import VOCABULARY, write_gguf, write_safetensors
from benchmarks.smollm2 import gguf


@dataclass(frozen=True)
class Model:
    """A model in the folder of the weights.

    Attributes:
        name: how it is asked for.
        folder: where its weights are kept.
        has_tokenizer: whether it can be asked in words.
        write: what writes the folder of a model without a tokenizer, as Hugging Face publishes it.
        vocabulary: number of token ids, for a model without a tokenizer.
    """

    name: str
    folder: Path
    has_tokenizer: bool
    write: Callable[[Path], None] = write_safetensors
    vocabulary: int = VOCABULARY

    def weights(self, contender: Contender) -> Path:
        """Where a contender's weights are, or will be."""
        suffix = ".gguf" if contender.peer == LLAMA else ""
        precision = contender.precision if contender.peer in (JLLM, LLAMA) else "hf"  # transformers casts as it loads
        return self.folder / f"{contender.peer}-{precision}{suffix}"

    def prepare(self, contender: Contender, threads: int) -> None:
        """Make a contender's weights, unless they are there."""
        target = self.weights(contender)
        if contender.peer == JLLM:
            options = _options(contender.precision)
            make(target, lambda part: _convert("convert", self._source(), part, *options))
        elif contender.peer == LLAMA:
            task = {"kind": "quantise", "source": str(self._gguf()), "precision": contender.precision}
            make(target, lambda part: ask(contender, {**task, "target": str(part), "threads": threads}, threads))
        elif self.has_tokenizer:
            self.prepare(Contender(JLLM, "float32"), threads)
            exact = self.weights(Contender(JLLM, "float32"))
            make(target, lambda part: _convert("export", exact, part))
        else:
            make(target, self.write)

    def _source(self) -> Path:
        """What jllm-convert reads."""
        if self.has_tokenizer:
            return self._gguf()
        made: Path = make(self.folder / "transformers-hf", self.write)
        return made

    def _gguf(self) -> Path:
        """What llama.cpp re-quantises."""
        if not self.has_tokenizer:
            return make(self.folder / "source.gguf", write_gguf)
        return gguf()


def find_model(name: str, folder: Path) -> Model:
    """``smollm2``, real weights, or ``qwen3-0.6b``, random numbers in the shapes of that model."""
    return Model(name, folder / "models" / name, has_tokenizer=name == "smollm2")


MODELS = ("smollm2", "qwen3-0.6b")


def make(target: Path, write: Callable[[Path], None]) -> Path:
    """Write a file or a folder under another name first, so that what is there is whole."""
    if not target.exists():
        print(f"making {target}", file=sys.stderr, flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name("part-" + target.name)
        shutil.rmtree(part, ignore_errors=True)
        part.unlink(missing_ok=True)
        write(part)
        os.replace(part, target)
    return target


def _options(precision: str) -> list[str]:
    """What ``convert`` is asked for: of a quantised model the embedding is in 8 bits, as llama.cpp has it, too."""
    if precision.startswith("int"):
        quantized, _, rest = precision.partition("-")
        return ["--dtype", rest or "float32", "--quantize", quantized, "--embedding", "int8"]
    return ["--dtype", precision]


def _convert(command: str, source: Path, target: Path, *options: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "jllm_convert.cli", command, str(source), str(target), *options],
        check=True,
        stdout=subprocess.DEVNULL,
    )
