"""Selection of the files of a hub repository that a conversion reads."""

import json
import re
from pathlib import Path
from typing import Any

from jllm_convert.errors import ConversionError
from jllm_convert.files.model_folder import (
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    PICKLE_SUFFIXES,
    SINGLE_FILE,
    TOKENIZER_FILES,
    files_without_index,
    is_named_template,
)
from jllm_convert.hub.remote_file import RemoteFile, stays_inside
from jllm_convert.hub.repository import Repository
from jllm_convert.hub.store import Store

_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf", re.IGNORECASE)


def gguf_file(repository: Repository, name: str) -> RemoteFile:
    """Select a GGUF file by its name.

    Raises:
        ConversionError: there is none, or it is one of several parts.
    """
    if part := _PART.search(name):
        raise ConversionError(
            f"{name} is one of {int(part[1])} parts, and parts are not joined here: download them with `hf download`, "
            "join them with `llama-gguf-split --merge`, and give the file"
        )
    if name not in repository.files:
        raise ConversionError(
            f"{repository.url} has no {name} at {repository.commit}; it has {_listed(repository, ('.gguf',))}"
        )
    return repository.files[name]


def model_files(repository: Repository, store: Store) -> list[RemoteFile]:
    """Select the files of the repository's own model: config, generation settings, tokenizer, safetensors.

    Raises:
        ConversionError: the repository has no complete model in safetensors, or its index names files elsewhere.
    """
    files, where = repository.files, f"{repository.url} at {repository.commit}"
    # The index wins: a repository may have a single file with other weights besides.
    if INDEX_FILE in files:
        weights = [INDEX_FILE, *_shards(repository, store, files[INDEX_FILE])]
    else:
        weights = files_without_index(files)
    if not weights:
        raise _without_safetensors(repository)
    missing = [name for name in (CONFIG_FILE, *weights) if name not in files]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ConversionError(f"{where} lacks {', '.join(missing[:5])}{more}, without which its model cannot be read")
    small = (CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES, *sorted(filter(is_named_template, files)))
    return [files[name] for name in (*small, *weights) if name in files]


def config_file(repository: Repository) -> RemoteFile:
    """Select the config.json of the repository's own model.

    Raises:
        ConversionError: it has none, or no model in safetensors.
    """
    files = repository.files
    if INDEX_FILE not in files and not files_without_index(files):
        raise _without_safetensors(repository)
    if CONFIG_FILE not in files:
        raise ConversionError(
            f"{repository.url} at {repository.commit} lacks {CONFIG_FILE}, without which its model cannot be read"
        )
    return files[CONFIG_FILE]


def _without_safetensors(repository: Repository) -> ConversionError:
    where = f"{repository.url} at {repository.commit}"
    return ConversionError(f"{where} has no {SINGLE_FILE} and no {INDEX_FILE}. {_other_weights(repository)}")


def _shards(repository: Repository, store: Store, index: RemoteFile) -> list[str]:
    """The weight files that the index names, sorted."""
    # The index decides which shards to download, so it is read before the download itself.
    here = store.find(index)
    try:
        names = _weight_files(repository.read(index) if here is None else here.read_bytes())
    except ValueError as error:
        raise ConversionError(f"{repository.url}: {index.name} {error}") from error
    # The name becomes a path here. With this ending it is neither a pickle nor a file of our own.
    hostile = [name for name in names if not stays_inside(name) or "/" in name or not name.endswith(".safetensors")]
    if hostile or not names:
        raise ConversionError(
            f"{repository.url}: {index.name} puts tensors in {', '.join(map(repr, sorted(hostile)[:5])) or 'no file'}; "
            "expected .safetensors files beside it, so nothing is downloaded"
        )
    return sorted(names)


def _weight_files(index: bytes) -> set[str]:
    """Parse the names of weight files in an index.

    Raises:
        ValueError: it is no index.
    """
    content: Any = json.loads(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError("has no weight_map of tensors to files")
    return set(weight_map.values())


def _other_weights(repository: Repository) -> str:
    """Advice for a repository without safetensors, by the other files it has."""
    gguf = [name for name in repository.files if name.lower().endswith(".gguf")]
    if gguf:
        ids = ", ".join(f"{repository.repo}/{name}" for name in sorted(gguf))
        return f"It has GGUF files; download one by its own name: {ids}"
    if any(name.lower().endswith(PICKLE_SUFFIXES) for name in repository.files):
        return (
            f"It has {_listed(repository, PICKLE_SUFFIXES)}, which can run any code when loaded and so are not taken. "
            "Ask the publisher for safetensors: https://huggingface.co/spaces/safetensors/convert opens a pull request "
            "with them, which is a revision like refs/pr/1"
        )
    return f"It has {_listed(repository, ('',))}; expected a model of its own, in safetensors"


def _listed(repository: Repository, endings: tuple[str, ...]) -> str:
    names = sorted(name for name in repository.files if name.lower().endswith(endings))
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more if names else "no such files"


def has_model(folder: Path) -> bool:
    """Whether a folder has the config and all weight files of a model."""
    # The index wins, as in ``model_files``.
    if (folder / INDEX_FILE).is_file():
        try:
            weights = _weight_files((folder / INDEX_FILE).read_bytes())
        except ValueError:
            return False
    else:
        weights = set(files_without_index([path.name for path in folder.iterdir()]))
    # Of several shards a publisher has an index too, and a download that lacks it lacks perhaps more.
    if len(weights) != 1 and not (folder / INDEX_FILE).is_file():
        return False
    return all((folder / name).is_file() for name in (CONFIG_FILE, *weights))
