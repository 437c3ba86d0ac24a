"""Fuzz target for GGUF files: each must convert, or be refused with a ConversionError.

    python fuzz/fuzz_gguf.py fuzz/corpus/gguf -max_total_time=600

The input is the file. The target does what a conversion does with a source: config, tokenizer, tensors.
"""

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["jllm_convert"]):
    from jllm_convert.errors import ConversionError
    from jllm_convert.sources.base import SourceTensor
    from jllm_convert.sources.gguf.source import GGUFSource


def check(folder: Path, content: bytes) -> None:
    """Open the file, read its config and tokenizer, and read every tensor, whole and in part.

    Raises:
        Exception: of any kind, where the converter has an error.
    """
    path = folder / "model.gguf"
    path.write_bytes(content)
    with refusal():
        source = GGUFSource(path)
        for ask in (source.config, source.generation_config, lambda: source.write_tokenizer(folder)):
            with refusal():
                ask()
        source.fingerprint()
        for tensor in source.tensors.values():
            check_tensor(tensor)


def check_tensor(tensor: SourceTensor) -> None:
    """Read a tensor of an intact file, whole and in part."""
    box = tuple(slice(size // 3, size - size // 3) for size in tensor.shape)
    values, part = tensor.read(), tensor.read(box)
    if (values.shape, values.dtype) != (tensor.shape, tensor.dtype):
        raise TypeError(f"{tensor} was read as {values.dtype} {values.shape}")
    if part.tobytes() != values[box].tobytes():
        raise ValueError(f"{tensor} has other values in the box {box} than in the whole")


@contextlib.contextmanager
def refusal():
    """Accept a ConversionError in the block, if its message can be printed on a terminal."""
    try:
        yield
    except ConversionError as error:
        message = str(error)
        message.encode()
        if not message.replace("\n", " ").isprintable():
            raise ValueError(f"a message for no terminal: {message!r}") from error


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        atheris.Setup(sys.argv, lambda content: check(Path(name), content))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
