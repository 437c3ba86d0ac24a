"""Where a model's files come from, as far as they tell."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Where huggingface_hub keeps what it has downloaded: in its cache, or into a folder of the user's own.
_CACHE = re.compile(r"models--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)$")
_RECORD = Path(".cache", "huggingface", "download", "config.json.metadata")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def origin_of_folder(folder: Path) -> dict[str, Any]:
    """The name of a Hugging Face folder's model and its revision, each None where huggingface_hub left no trace."""
    cached = _CACHE.search(folder.absolute().as_posix())
    if cached is not None:
        return {"name": cached["name"].replace("--", "/"), "revision": cached["revision"]}
    try:
        commit = (folder / _RECORD).read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, ValueError):
        commit = ""
    return {"name": None, "revision": commit if _COMMIT.fullmatch(commit) else None}


def origin_of_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The name that a GGUF file gives its model; it records no revision."""
    name = metadata.get("general.name")
    return {"name": name if isinstance(name, str) else None, "revision": None}
