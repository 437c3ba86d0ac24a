"""What jllm-runtime finds under the entry point group ``jllm.resolvers``: names of models to converted folders."""

import hashlib
import os
from pathlib import Path

from jllm_convert.cli import progress_bar
from jllm_convert.errors import ConversionError


def resolve(model: str) -> Path | None:
    """The converted form of a Hugging Face folder or GGUF file, converting it on first use.

    Conversions are kept in the user's cache folder (``JLLM_CACHE``, or the platform's own), by the source's path,
    sizes and times of change.

    Args:
        model: what the user called the model.

    Returns:
        The checkpoint, or None where ``model`` is nothing that this package converts.

    Raises:
        ConversionError: it is, and the conversion fails.
    """
    source = Path(model)
    try:
        known = source.is_dir() or (source.is_file() and source.suffix.lower() == ".gguf")
    except OSError:  # a name that no file could have
        return None
    if not known:
        return None
    from jllm_core import checkpoint

    from jllm_convert.conversion import convert

    source = source.resolve()
    # The format is part of the name, so that a newer version makes conversions of its own.
    target = _cache_folder() / f"{source.stem}-{_fingerprint(source)}-v{checkpoint.FORMAT_VERSION}"
    if not checkpoint.is_checkpoint(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with progress_bar(f"converting {source.name}") as on_progress:
            try:
                convert(source, target, on_progress=on_progress)
            except ConversionError:
                # Another process may have put the same conversion in place meanwhile.
                if not checkpoint.is_checkpoint(target):
                    raise
    return target


def _cache_folder() -> Path:
    import platformdirs

    return Path(os.environ.get("JLLM_CACHE") or platformdirs.user_cache_dir("jllm", appauthor=False)) / "converted"


def _fingerprint(source: Path) -> str:
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    parts = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files if path.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
