"""Hash of a model's contents, by which files that were moved, renamed or touched are known again."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jllm_core.errors import reason

from jllm_convert.errors import ConversionError
from jllm_convert.files.model_folder import CONFIG_FILE, GENERATION_FILE, INDEX_FILE, tokenizer_file_names
from jllm_convert.files.regular_file import RegularFile, read_into

# A file is hashed in pieces, several at a time: hashing is as fast as the disk only with several processors.
_PIECE_BYTES = 16 << 20
_PIECES_AT_ONCE = 4


def model_files(source: Path) -> list[RegularFile]:
    """Find the files of a model that a conversion reads: a GGUF file, or those of a Hugging Face folder.

    Raises:
        ConversionError: one of them is not accessible.
    """
    try:
        if not source.is_dir():
            return [_regular_file(source, source.name)]
        weights = {path.name for path in source.iterdir() if path.suffix == ".safetensors"}
        names = weights | {CONFIG_FILE, GENERATION_FILE, INDEX_FILE, *tokenizer_file_names(source)}
        return [_regular_file(source / name, name) for name in sorted(names) if (source / name).is_file()]
    except OSError as error:
        raise ConversionError(f"{source} cannot be read: {error}") from error


def _regular_file(path: Path, name: str) -> RegularFile:
    return RegularFile.at(Path(os.path.realpath(path, strict=True)), name)


def state(files: Sequence[RegularFile]) -> str:
    """Hash (SHA-256, in hex) what changes whenever one of the files does; reads none of them.

    Besides size and time of change that is the inode and the time of *its* change, which no program sets: a file that
    was replaced or written to has another one, even where its size is the same and its date was put back.
    """
    parts = []
    for file in files:
        try:
            found = os.stat(file.path)
        except OSError as error:
            raise ConversionError(f"{file.path} cannot be read: {reason(error)}") from error
        parts.append(f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def content_hash(files: Sequence[RegularFile]) -> str:
    """Hash (SHA-256, in hex) all bytes of the files, and the names they have in a folder of several.

    Raises:
        ConversionError: one of them cannot be read, or changes meanwhile.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_PIECES_AT_ONCE) as pool:
        for file in files:
            # The name of a single file may change.
            digest.update(f"{file.name if len(files) > 1 else ''} {file.size}\n".encode("utf-8", "surrogateescape"))
            with file.reading("its content") as descriptor:

                def piece(start: int, file: RegularFile = file, descriptor: int = descriptor) -> bytes:
                    content = bytearray(min(_PIECE_BYTES, file.size - start))
                    read_into(descriptor, memoryview(content), start)
                    return hashlib.sha256(content).digest()

                for each in pool.map(piece, range(0, file.size, _PIECE_BYTES)):
                    digest.update(each)
    return digest.hexdigest()
