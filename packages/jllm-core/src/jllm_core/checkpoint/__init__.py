"""Checkpoint format: the folder that jllm-convert writes and jllm-runtime reads.

A checkpoint is a folder::

    manifest.json            format and version, where it came from, name, shape, type and hash of every array
    model.json               the ModelConfig
    weights/                 the arrays, as zarr 3 with orbax's metadata (any orbax restores them, without JLLM)
    generation_config.json   the publisher's settings of sampling, and the ids that end a text
    tokenizer.json ...       the publisher's tokenizer files

The libraries that write metadata and checksums are an extra of jllm-core (``pip install "jllm-core[checkpoint]"``), and
are imported when they are first needed.
"""

from jllm_core.checkpoint.array_store import ArrayStore, dtype_named
from jllm_core.checkpoint.chunk_grid import Box, blocks, box_shape, chunk_shape, whole
from jllm_core.checkpoint.manifest import (
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    GENERATION_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    WEIGHTS_FOLDER,
    CheckpointError,
    Dtype,
    Manifest,
    is_checkpoint,
    read_config,
    read_eos_ids,
    read_generation_config,
    read_manifest,
)
from jllm_core.checkpoint.nonfinite import first_made_infinite, first_nonfinite
from jllm_core.checkpoint.restoring import check_against_config, restore_weights
from jllm_core.checkpoint.saving import save_checkpoint, save_weights, sync, write_orbax_metadata

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
    "Dtype",
    "Manifest",
    "blocks",
    "box_shape",
    "check_against_config",
    "chunk_shape",
    "dtype_named",
    "first_made_infinite",
    "first_nonfinite",
    "is_checkpoint",
    "read_config",
    "read_eos_ids",
    "read_generation_config",
    "read_manifest",
    "restore_weights",
    "save_checkpoint",
    "save_weights",
    "sync",
    "whole",
    "write_orbax_metadata",
]
