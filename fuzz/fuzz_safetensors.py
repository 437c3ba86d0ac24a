"""Fuzz target for safetensors files: each must convert, or be refused with a ConversionError.

    python fuzz/fuzz_safetensors.py fuzz/corpus/safetensors -max_total_time=600

The input is the file; the folder around it has a config.json that allows FP8 weights with scales.
"""

import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["jllm_convert", "json"]):
    from jllm_convert.errors import ConversionError
    from jllm_convert.sources.huggingface.folder import SafetensorsSource

CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def check(folder: Path, content: bytes) -> None:
    """Open the file and read every tensor, whole and in part.

    Raises:
        Exception: of any kind, where the converter has an error.
    """
    (folder / "model.safetensors").write_bytes(content)
    try:
        source = SafetensorsSource(folder)
    except ConversionError as error:
        str(error).encode()  # a message that cannot be printed is an error, too
        return
    for tensor in source.tensors.values():
        box = tuple(slice(size // 3, size - size // 3) for size in tensor.shape)
        values, part = tensor.read(), tensor.read(box)
        if (values.shape, values.dtype) != (tensor.shape, tensor.dtype):
            raise TypeError(f"{tensor} was read as {values.dtype} {values.shape}")
        if part.tobytes() != values[box].tobytes():
            raise ValueError(f"{tensor} has other values in the box {box} than in the whole")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        atheris.Setup(sys.argv, lambda content: check(folder, content))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
