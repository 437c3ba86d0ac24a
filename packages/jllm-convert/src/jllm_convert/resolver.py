"""Resolver of model names for jllm-runtime (entry point group ``jllm.resolvers``): convert on first use, then cache."""

import hashlib
import os
import time
from pathlib import Path

from jllm_convert.cli import progress_bar
from jllm_convert.errors import BusyError, ConversionError


def resolve(model: str) -> Path | None:
    """Resolve a Hugging Face folder, a GGUF file or a model on the hub to a checkpoint, converting it on first use.

    Conversions are kept in the user's cache folder (``JLLM_CACHE``, or the platform's own), by the source's path,
    sizes and times of change, or by its commit on the hub.

    Args:
        model: the path or the name that the user gave.

    Returns:
        The checkpoint, or None where this package cannot convert ``model``.

    Raises:
        ConversionError: the download or the conversion fails.
    """
    source = Path(model)
    try:
        known = source.is_dir() or (source.is_file() and source.suffix.lower() == ".gguf")
    except OSError:  # such as a name that is too long for a path
        return None
    from jllm_core import checkpoint

    from jllm_convert.hub.downloading import local_path, origin
    from jllm_convert.hub.model_id import looks_like_id
    from jllm_convert.writing.progress import byte_progress

    # A path wins over a model on the hub with the same name.
    if known:
        source = source.resolve()
        name = f"{source.stem}-{_fingerprint(source)}"
    elif looks_like_id(model):
        with progress_bar(f"downloading {model}") as on_progress:
            source = local_path(model, on_progress=byte_progress(on_progress))
        published = origin(source) or {}
        name = f"{model.replace('/', '--')}-{published.get('revision', _fingerprint(source))[:12]}"
    else:
        return None
    # The format is part of the name, so that a newer version makes conversions of its own.
    target = _cache_folder() / f"{name}-v{checkpoint.FORMAT_VERSION}"
    while not checkpoint.is_checkpoint(target):
        _convert(source, target)
    return target


def _convert(source: Path, target: Path) -> None:
    """Convert once. Returns without a checkpoint at ``target`` where another process is busy with it."""
    from jllm_core import checkpoint

    from jllm_convert.conversion import convert

    target.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar(f"converting {source.name}") as on_progress:
        try:
            convert(source, target, on_progress=on_progress)
        except BusyError:  # another process is making this conversion: wait for its result
            time.sleep(0.2)
        except ConversionError:
            # Another process may have finished the same conversion meanwhile.
            if not checkpoint.is_checkpoint(target):
                raise


def _cache_folder() -> Path:
    import platformdirs

    return Path(os.environ.get("JLLM_CACHE") or platformdirs.user_cache_dir("jllm", appauthor=False)) / "converted"


def _fingerprint(source: Path) -> str:
    """A hash over the paths, sizes and times of change of a source's files; reads none of them."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    parts = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files if path.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
