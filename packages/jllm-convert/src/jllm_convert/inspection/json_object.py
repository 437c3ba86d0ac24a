"""A JSON object in a file that may be missing or damaged."""

import json
from pathlib import Path
from typing import Any


def json_object(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """The object; None where there is no file, or none that holds an object, which ``problems`` then say."""
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name}: cannot be read as JSON: {error}")
        return None
    if not isinstance(fields, dict):
        problems.append(f"{path.name}: must hold a JSON object, got {type(fields).__name__}")
        return None
    return fields
