"""The checkpoint on disk: what jllm-convert writes and jllm-runtime reads.

A checkpoint is a folder::

    manifest.json            format and version, where it came from, name, shape, type and hash of every array
    model.json               the ModelConfig
    weights/                 the arrays, as zarr 3 with orbax's metadata (any orbax restores them, without JLLM)
    generation_config.json   what the publisher says of sampling and of the end of a text
    tokenizer.json ...       the publisher's tokenizer files

What reads and writes arrays is an extra of jllm-core (``pip install "jllm-core[checkpoint]"``), and is imported when it
is first needed.
"""

from jllm_core.checkpoint.array_store import ArrayStore, Box, blocks, box_shape, chunk_shape, dtype_named, whole
from jllm_core.checkpoint.manifest import (
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    GENERATION_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    WEIGHTS_FOLDER,
    CheckpointError,
    Manifest,
    is_checkpoint,
    read_config,
    read_eos_ids,
    read_manifest,
)
from jllm_core.checkpoint.restoring import check_against_config, restore_weights
from jllm_core.checkpoint.saving import save_weights, sync, write_orbax_metadata

__all__ = [
    "DTYPES",
    "FORMAT",
    "FORMAT_VERSION",
    "GENERATION_FILE",
    "MANIFEST_FILE",
    "MODEL_FILE",
    "WEIGHTS_FOLDER",
    "ArrayStore",
    "Box",
    "CheckpointError",
    "Manifest",
    "blocks",
    "box_shape",
    "check_against_config",
    "chunk_shape",
    "dtype_named",
    "is_checkpoint",
    "read_config",
    "read_eos_ids",
    "read_manifest",
    "restore_weights",
    "save_weights",
    "sync",
    "whole",
    "write_orbax_metadata",
]
