"""Paths that a user gives, checked for what no file system takes."""

import os
from pathlib import Path

from jllm_convert.errors import ConversionError


def checked_path(path: str | Path) -> Path:
    """The path, if it can be one.

    Raises:
        ConversionError: it is empty, or has characters that this system's file names cannot have.
    """
    text = os.fspath(path)
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise ConversionError(
            f"{text!r} cannot be a path: character {error.start} has no form in {error.encoding}, the encoding of file "
            "names here"
        ) from error
    if not text or b"\0" in encoded:
        raise ConversionError(f"{text!r} cannot be a path: it is empty, or has a zero character")
    return Path(text)
