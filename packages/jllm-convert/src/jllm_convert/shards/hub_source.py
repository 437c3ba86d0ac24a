"""Source of a model on the hub whose weight files are fetched when they are read."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jllm_core.checkpoint import Box
from jllm_core.config import ModelConfig

from jllm_convert.errors import ConversionError, DestinationError
from jllm_convert.hub.downloading import check_revision, disk_errors, fetch_and_install
from jllm_convert.hub.model_id import ModelId, looks_like_id
from jllm_convert.hub.remote_file import RemoteFile
from jllm_convert.hub.repository import PARTIAL_SUFFIX, Repository
from jllm_convert.hub.selection import gguf_file, model_files
from jllm_convert.hub.store import CacheStore, cache_folder
from jllm_convert.shards.remote_shards import RemoteShards, mark_name
from jllm_convert.sources.base import Source, SourceTensor
from jllm_convert.sources.opening import open_source
from jllm_convert.writing.partial_checkpoint import is_resumable

_WEIGHTS = (".safetensors", ".gguf")


class HubSource:
    """A model on the hub: headers and small files are here, weight files come when a tensor in them is read.

    Args:
        source: the model, opened by its headers.
        shards: its weight files.
        identity: what tells this model from others: its repository and commit.
        small_nbytes: the bytes of the files besides the weights.
        folder: the folder of all files.
    """

    def __init__(
        self, source: Source, shards: RemoteShards, identity: Sequence[str], small_nbytes: int, folder: Path
    ) -> None:
        self._source, self.shards, self._identity, self._folder = source, shards, tuple(identity), folder
        self.small_nbytes = small_nbytes
        self.is_handed_over = False
        self.path, self.naming, self.left_out = source.path, source.naming, source.left_out
        self.tensors: Mapping[str, SourceTensor] = {
            name: self._fetched_when_read(tensor) for name, tensor in source.tensors.items()
        }

    def config(self) -> ModelConfig:
        """Read the normalised architecture."""
        return self._source.config()

    def generation_config(self) -> dict[str, object]:
        """Read the publisher's settings of generation."""
        return self._source.generation_config()

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Write the tokenizer files into ``folder``; return their names."""
        return self._source.write_tokenizer(folder)

    def fingerprint(self) -> str:
        """Hash what the files are: the repository, the commit and the name. Times of change say nothing here."""
        return hashlib.sha256(json.dumps(self._identity).encode()).hexdigest()

    @contextlib.contextmanager
    def handed_over(self) -> Iterator[None]:
        """Hand the files over to a block, which renames or removes the folder that they are in when it has ended.

        Whoever opened the source leaves them alone from here on: their folder's name may be another process's by then.
        The block removes them when it is done with them. Where it fails, downloads are ended first, and the files are
        deleted unless the next run needs them.
        """
        self.is_handed_over = True
        try:
            yield
        except BaseException as error:
            self.shards.close()
            _remove_unless_useful(self._folder, error)
            raise

    def remove(self) -> None:
        """Delete all of its files. Nothing can be read afterwards."""
        self.shards.close()
        shutil.rmtree(self._folder)

    def _fetched_when_read(self, tensor: SourceTensor) -> SourceTensor:
        files = shards_of(tensor)

        def read(box: Box) -> np.ndarray:
            # Whoever reads out of turn waits for the download: never are the empty bytes behind a header read.
            for path in files:
                self.shards.ensure(path)
            return tensor.read_box(box)

        return replace(tensor, read_box=read)


def shards_of(tensor: SourceTensor) -> tuple[str, ...]:
    """The weight files that a tensor's values are in, as ``RemoteShards`` names them."""
    return tuple(dict.fromkeys(map(str, (tensor.where, *tensor.also))))


@contextlib.contextmanager
def open_hub_source(
    model_id: str, revision: str | None, folder: Path, ignored: Sequence[str], count: Callable[[int], None]
) -> Iterator[HubSource]:
    """Open a model on the hub without its weights, for the length of a ``with`` block.

    Args:
        model_id: ``owner/name``, or ``owner/name/file.gguf``.
        revision: a branch, a tag or a commit; None is ``main``.
        folder: the folder for its files, which is laid out as the hub's cache is. Files of the same commit are used,
            all others are deleted. It is removed in the end, unless the block fails in a way that another run
            may not, and there are weights in it, or it was handed over (``HubSource.handed_over``).
        ignored: fields of its config that this version does not know, as ``open_source`` has them.
        count: called with the bytes of weights that come.

    Raises:
        ConversionError: there is no such model on the hub, or it cannot be converted.
        DownloadError: the hub cannot be reached.
    """
    from huggingface_hub import constants

    if not looks_like_id(model_id):
        raise ConversionError(
            f"{model_id} is no model on the hub, and only such a model is converted while it is downloaded; expected "
            "owner/name or owner/name/file.gguf, or leave out stream_from_hub (--stream-from-hub)"
        )
    if constants.is_offline_mode():
        raise ConversionError(
            f"offline (HF_HUB_OFFLINE), and {model_id} is to be read from the hub; leave out stream_from_hub "
            "(--stream-from-hub) to convert a copy in the cache, or unset HF_HUB_OFFLINE"
        )
    wanted = ModelId.parse(model_id)
    check_revision(revision)
    repository = Repository(wanted.repo, revision or "main")
    store = CacheStore(wanted.repo, revision or "main", repository.commit, folder)
    shards: RemoteShards | None = None
    opened: HubSource | None = None
    try:
        with disk_errors(store):
            _delete_others(folder, wanted.repo, repository.commit)
            files = [gguf_file(repository, wanted.file)] if wanted.file else model_files(repository, store)
            _delete_unwanted(store, files)
            small = [file for file in files if not file.name.lower().endswith(_WEIGHTS)]
            weights = [file for file in files if file.name.lower().endswith(_WEIGHTS)]
            repository.check_access(weights[0])
            fetch_and_install(repository, store, small, None)
            shards = RemoteShards(repository, store, weights, count)
        source = open_source(store.folder / wanted.file if wanted.file else store.folder, ignored)
        identity = (wanted.repo, repository.commit, wanted.file or "")
        opened = HubSource(source, shards, identity, sum(file.size for file in small), folder)
        yield opened
    except BaseException as error:
        if shards is not None:
            shards.close()
        if opened is None or not opened.is_handed_over:
            _remove_unless_useful(folder, error)
        raise
    shards.close()
    if not opened.is_handed_over:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_unless_useful(folder: Path, error: BaseException) -> None:
    """Remove a source's files after an error, unless the next run may succeed and need not fetch them again."""
    another_time = is_resumable(error) or isinstance(error, DestinationError)
    if not (another_time and holds_weights(folder)):
        shutil.rmtree(folder, ignore_errors=True)


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds weights, whole ones or parts, that the next run need not fetch again."""
    return any(folder.glob("models--*/blobs/*.whole")) or any(
        path.stat().st_size for path in folder.glob("models--*/blobs/*.jllm.incomplete")
    )


def _delete_others(folder: Path, repo: str, commit: str) -> None:
    """Delete what an earlier run has left of another model or commit."""
    own = cache_folder(repo, folder)
    snapshots = own / "snapshots"
    others = [path for path in snapshots.glob("*") if path.name != commit]
    if others or any(path != own and path.name != ".locks" for path in folder.glob("*")):
        shutil.rmtree(folder)


def _delete_unwanted(store: CacheStore, files: Sequence[RemoteFile]) -> None:
    """Delete what an earlier run has left of other files of the same commit, such as another GGUF file."""
    names = {store.folder / file.name for file in files}
    keys = {name for file in files for name in (file.key, f"{file.key}{PARTIAL_SUFFIX}", mark_name(file))}
    for path in store.folder.rglob("*"):
        if path not in names and not path.is_dir():
            path.unlink()
    for path in store.blobs.glob("*"):
        if path.name not in keys:
            path.unlink()
