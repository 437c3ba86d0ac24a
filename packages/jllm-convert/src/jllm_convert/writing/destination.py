"""Destination of a conversion: what may be replaced there, and whether there is room."""

from collections.abc import Sequence
from pathlib import Path

from jllm_core import checkpoint

from jllm_convert.errors import ConversionError, DestinationError
from jllm_convert.files.disk_space import free_space, stored_under
from jllm_convert.writing import partial_checkpoint
from jllm_convert.writing.tensor_jobs import TensorJob, stored_nbytes


def check_destination(dst: Path, overwrite: bool, exist_ok: bool = False) -> None:
    """Refuse to replace anything but a checkpoint, and a checkpoint without ``overwrite``."""
    if not dst.exists() and not dst.is_symlink():
        return
    if dst.is_dir() and not any(dst.iterdir()):
        return
    if not checkpoint.is_checkpoint(dst):
        raise ConversionError(f"{dst} exists and is not a JLLM checkpoint, so it is not replaced; choose another name")
    if exist_ok and not overwrite:
        raise ConversionError(
            f"{dst} exists and is another conversion: of other files (or of these before they were changed or copied), "
            "with another adapter, or stored in other types; choose another name, or replace it with overwrite "
            "(--overwrite)"
        )
    if not overwrite:
        raise ConversionError(f"{dst} exists; choose another name, or replace it with overwrite (--overwrite)")


def check_space(dst: Path, jobs: Sequence[TensorJob]) -> None:
    """Refuse a conversion that the disk has no room for. Files of an interrupted one count as room."""
    needed = stored_nbytes(jobs)
    parent, free = free_space(dst.absolute().parent)
    # Their space is given back, or they are resumed and need not be written again.
    free += stored_under(partial_checkpoint.partial_folder(dst))
    if needed > free:
        raise DestinationError(
            f"{dst} needs {needed:,} bytes, {parent} has {free:,} free; make room, or convert to another disk"
        )
