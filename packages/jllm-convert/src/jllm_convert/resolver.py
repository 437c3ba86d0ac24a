"""Resolver of model names for jllm-runtime (entry point group ``jllm.resolvers``): convert on first use, then cache.

The cache, ``converted`` in ``JLLM_CACHE``, has a checkpoint ``NAME-HASH-vVERSION`` for each model. The hash is of the
model's contents, so that a file that was moved, renamed or touched is known again. ``.sources`` in it saves hashing
gigabytes at each start: it has the hash of a contents by the state of its files. ``.uses`` has a file for each
checkpoint, whose time of change is that of the last use; whoever uses the checkpoint holds a shared lock on it.
"""

import contextlib
import functools
import hashlib
import os
import uuid
from pathlib import Path

from jllm_convert.errors import ConversionError, DestinationError
from jllm_convert.progress_bar import progress_bar

SOURCES_FOLDER, USES_FOLDER = ".sources", ".uses"
# Part of the hash, so that another choice of types makes conversions of its own.
_STORAGE_VERSION = 1


def resolve(model: str, folder: Path | None = None) -> Path | None:
    """Resolve a Hugging Face folder, a GGUF file or a model on the hub to a checkpoint, converting it on first use.

    Conversions are kept in the user's cache folder (``JLLM_CACHE``, or the platform's own), by the hash of what is in
    the source's files, or by its commit on the hub. They have the types of the source (``storage_of``). Where
    something is converted, a line on standard error says what it is and where.

    Any number of processes and threads may resolve one model at the same time: one of them converts it.

    Args:
        model: the path or the name that the user gave.
        folder: a folder for the conversion, instead of the cache.

    Returns:
        The checkpoint, or None where this package cannot convert ``model``.

    Raises:
        ConversionError: the download or the conversion fails, or the cache cannot be used.
    """
    source = Path(model)
    try:
        known = source.is_dir() or (source.is_file() and source.suffix.lower() == ".gguf")
    except (OSError, ValueError):  # such as a name that is too long for a path
        return None
    from jllm_convert.hub.downloading import local_path, origin
    from jllm_convert.hub.model_id import looks_like_id
    from jllm_convert.writing.progress import byte_progress

    # A path wins over a model on the hub with the same name.
    if known:
        # Of a link, the name that it leads to is a hash in the hub's cache, and the folder's own elsewhere.
        name = source.stem if source.is_file() else source.resolve().name
    elif looks_like_id(model):
        with progress_bar(f"downloading {model}") as on_progress:
            source = local_path(model, on_progress=byte_progress(on_progress))
        name = model.replace("/", "--")
    else:
        return None
    if folder is not None:
        _convert(source, folder / name)
        return folder / name
    cache = cache_folder()
    try:
        # A commit stands for all contents; what else may be in its repository is told by the name.
        published = None if known else origin(source)
        contents = _contents(source, cache) if published is None else f"{model} {published['revision']}"
        return _in_cache(source, name, contents, cache)
    except (OSError, DestinationError) as error:
        raise ConversionError(
            f"the cache folder {cache} cannot be used ({error}); set JLLM_CACHE to a folder that can be written and "
            "has room, remove what is not needed with `jllm cache remove`, or do without it (--no-cache)"
        ) from error


def cache_folder() -> Path:
    """The folder of conversions: ``converted`` in ``JLLM_CACHE``, or in the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("JLLM_CACHE") or platformdirs.user_cache_dir("jllm", appauthor=False)) / "converted"


def _in_cache(source: Path, name: str, contents: str, cache: Path) -> Path:
    """The checkpoint of a model that is on this machine, by what tells its contents from all others."""
    from jllm_core import checkpoint

    key = hashlib.sha256(f"{contents} {_STORAGE_VERSION}".encode()).hexdigest()[:16]
    # The format is part of the name, so that a newer version makes conversions of its own.
    ending = f"-{key}-v{checkpoint.FORMAT_VERSION}"
    target = _checkpoint_with(ending, cache) or cache / f"{name}{ending}"
    # First the lock, then the look: what is there cannot be removed any more.
    _use(target)
    if not checkpoint.is_checkpoint(target):
        _convert(source, target, "; `jllm cache` lists and removes")
    return target


def _checkpoint_with(ending: str, cache: Path) -> Path | None:
    """A checkpoint whose name ends so: of the same contents, whatever they were called."""
    from jllm_core import checkpoint

    try:
        names = sorted(name for name in os.listdir(cache) if name.endswith(ending) and not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return next((cache / name for name in names if checkpoint.is_checkpoint(cache / name)), None)


def _convert(source: Path, target: Path, note: str = "") -> None:
    """Convert a source to a checkpoint that is not there yet, or wait for another process that does.

    Args:
        source: the folder or file.
        target: the checkpoint's name.
        note: what to say at the end of the line that says what was made.
    """
    import click
    from jllm_core import checkpoint
    from rich.filesize import decimal

    from jllm_convert.conversion import convert
    from jllm_convert.quality.storage_choice import storage_of
    from jllm_convert.sources.opening import open_source

    storage = storage_of(open_source(source))
    with progress_bar(f"converting {source.name}") as on_progress:
        try:
            made = convert(
                source,
                target,
                storage.dtype,
                storage.quantize,
                exist_ok=True,
                embedding=storage.embedding,
                receipt=False,  # the file's own numbers: what there is to lose was lost by its publisher
                on_progress=on_progress,
            )
        except DestinationError:
            raise
        except ConversionError:
            # Another process may have converted a copy of the same contents meanwhile.
            if not checkpoint.is_checkpoint(target):
                raise
            return
    if not made.is_new:  # another process or thread has said so
        return
    stored = f"{decimal(made.nbytes)}, {made.stored_as}"
    click.echo(f"converted {source.name} ({storage.words}) to {target}: {stored}{note}", err=True)
    for warning in made.warnings:
        click.echo(f"Warning: {warning}", err=True)


def _contents(source: Path, cache: Path) -> str:
    """The hash of what is in the source's files; they are read where their state is not known."""
    from jllm_convert.files.content_hash import content_hash, model_files, state

    files = model_files(source)
    remembered = cache / SOURCES_FOLDER / state(files)
    with contextlib.suppress(OSError, ValueError):
        known = remembered.read_text(encoding="ascii")
        if len(known) == 64:
            return known
    contents = content_hash(files)
    # A cache that cannot be written may still have the conversion.
    with contextlib.suppress(OSError):
        remembered.parent.mkdir(parents=True, exist_ok=True)
        new = remembered.with_name(f"{remembered.name}.{uuid.uuid4().hex}")
        new.write_text(contents, encoding="ascii")
        os.replace(new, remembered)
    return contents


@functools.cache
def _use(target: Path) -> int | None:
    """Note the time of use, and hold a shared lock until the process ends: `jllm cache` leaves it alone so long.

    Returns:
        The lock's descriptor; None where the cache cannot be written or has no locks.
    """
    from jllm_core import file_locks

    mark = target.parent / USES_FOLDER / target.name
    with contextlib.suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        return file_locks.lock(mark, mark.touch, shared=True)
    return None
