"""Console of a command: an output that cannot be written, an encoding without all letters, the exit codes."""

import contextlib
import errno
import os
import sys

FAILED, BAD_INPUT = 1, 2
"""Exit codes: a check found something, or an output could not be written; bad input, with a message."""

STOPPED = 130
"""Exit code after Ctrl-C, as shells have it: 128 and the number of SIGINT."""

CLOSED_PIPE = 141
"""Exit code when nobody reads the output any more, as of tools that SIGPIPE ends."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def write_any_letter() -> None:
    """Write what the encoding of the standard streams has not as ``\\u6f22``, instead of failing.

    C locales have an encoding without most letters. A lone surrogate, as of a file name that is not UTF-8, is in none.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Let what is still to be written to standard output go nowhere, so that Python does not try at its end."""
    # A test's stream has no file behind it.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def is_full_output(error: OSError) -> bool:
    """Whether standard output takes no more: a full disk, or a device like ``/dev/full``."""
    # An error of any other file says which one.
    return error.errno in _FULL and error.filename is None
