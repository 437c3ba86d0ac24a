"""Header of a weight file on the hub, in a local file that is as long as the whole one and otherwise empty."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from jllm_convert.errors import ConversionError
from jllm_convert.hub.remote_file import RemoteFile
from jllm_convert.hub.repository import Repository


def fetch_header(
    repository: Repository, file: RemoteFile, path: Path, header_end: Callable[[], int], first: int, limit: int
) -> int:
    """Download the beginning of a file up to the end of its header, and little more.

    A header's numbers are checked against the file's length, so the local file gets that length; as nothing is written
    behind the header, it takes no room on most disks.

    Args:
        repository: where the file is.
        file: the file.
        path: the local file, which is replaced.
        header_end: gives the bytes of the header by what is there, or raises a ConversionError as parsers do for half a
            header; then twice as many bytes are asked for.
        first: the bytes to ask for at first.
        limit: the most bytes that a header has. When they are there, an error of ``header_end`` is passed on.

    Returns:
        The bytes that were written.

    Raises:
        ConversionError: the download fails, or what comes has no header.
        OSError: the local file cannot be written.
    """
    enough, here = min(first, file.size), 0
    with path.open("wb") as stream:
        while here < enough:
            with contextlib.closing(repository.pieces(file, here, enough)) as pieces:
                for piece in pieces:
                    stream.write(piece)
            stream.flush()
            here = stream.tell()
            stream.truncate(file.size)
            try:
                enough = min(max(header_end(), here), file.size)
            except ConversionError as error:
                if here >= min(file.size, limit):
                    raise ConversionError(
                        f"{repository.url}: the header of {file.name} cannot be read: {error}"
                    ) from error
                enough = min(2 * enough, file.size)
    return here
