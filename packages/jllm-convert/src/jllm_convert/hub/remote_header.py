"""Header of a weight file on the hub, in a local file that is as long as the whole one and otherwise empty."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from jllm_convert.errors import ConversionError
from jllm_convert.hub.remote_file import RemoteFile
from jllm_convert.hub.repository import Repository


def fetch_header(
    repository: Repository, file: RemoteFile, path: Path, is_whole: Callable[[int], bool], enough: int, limit: int
) -> int:
    """Download the beginning of a file, and nothing behind its header but the rest of a piece.

    A header's numbers are checked against the file's length, so the local file gets that length; as nothing is written
    behind the header, it takes no room on most disks.

    Args:
        repository: where the file is.
        file: the file.
        path: the local file, which is replaced.
        is_whole: called with the bytes that are there, says whether the header is among them. It may raise a
            ConversionError, as parsers do for half a header; from ``limit`` on that is passed on.
        enough: the bytes with which ``is_whole`` is asked for the first time; then with twice as many, and so on.
        limit: the most bytes that a header has.

    Returns:
        The bytes that were written.

    Raises:
        ConversionError: the download fails, or what comes has no header.
        OSError: the local file cannot be written.
    """
    with contextlib.closing(repository.pieces(file)) as pieces, path.open("wb") as stream:
        for piece in pieces:
            stream.write(piece)
            here = stream.tell()
            if here < min(enough, file.size):
                continue
            stream.flush()
            stream.truncate(file.size)
            try:
                if is_whole(here):
                    break
            except ConversionError as error:
                if here >= min(file.size, limit):
                    raise ConversionError(
                        f"{repository.url}: the header of {file.name} cannot be read: {error}"
                    ) from error
            enough *= 2
        return stream.tell()
