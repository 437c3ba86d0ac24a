"""What jllm-runtime finds under the entry point group ``jllm.resolvers``: names of models to converted folders."""

import hashlib
import os
import time
from pathlib import Path

from jllm_convert.cli import progress_bar
from jllm_convert.errors import BusyError, ConversionError


def resolve(model: str) -> Path | None:
    """The converted form of a Hugging Face folder, a GGUF file or a model on the hub, converting it on first use.

    Conversions are kept in the user's cache folder (``JLLM_CACHE``, or the platform's own), by the source's path,
    sizes and times of change, or by its commit on the hub.

    Args:
        model: what the user called the model.

    Returns:
        The checkpoint, or None where ``model`` is nothing that this package converts.

    Raises:
        ConversionError: it is, and the download or the conversion fails.
    """
    source = Path(model)
    try:
        known = source.is_dir() or (source.is_file() and source.suffix.lower() == ".gguf")
    except OSError:  # a name that no file could have
        return None
    from jllm_core import checkpoint

    from jllm_convert.hub.downloading import local_path, origin
    from jllm_convert.hub.model_id import looks_like_id
    from jllm_convert.writing.progress import byte_progress

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
    from jllm_core import checkpoint

    from jllm_convert.conversion import convert

    target.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar(f"converting {source.name}") as on_progress:
        try:
            convert(source, target, on_progress=on_progress)
        except BusyError:  # then it is done there
            time.sleep(0.2)
        except ConversionError:
            # Another process may have put the same conversion in place meanwhile.
            if not checkpoint.is_checkpoint(target):
                raise


def _cache_folder() -> Path:
    import platformdirs

    return Path(os.environ.get("JLLM_CACHE") or platformdirs.user_cache_dir("jllm", appauthor=False)) / "converted"


def _fingerprint(source: Path) -> str:
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    parts = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files if path.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
