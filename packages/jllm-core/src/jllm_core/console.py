"""Console of a command: Ctrl-C, an output that cannot be written, an encoding without all letters, the exit codes."""

import _thread
import contextlib
import errno
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

FAILED = 1
"""Exit code when a check found something, or what is good could not be done. That of bad input: ``JLLMError``."""

STOPPED = 130
"""Exit code after Ctrl-C, as shells have it: 128 and the number of SIGINT."""

CLOSED_PIPE = 141
"""Exit code when nobody reads the output any more, as of tools that SIGPIPE ends."""

RETRY_S = 0.01
"""Seconds until an interrupt that was lost comes once more."""

IMPORTING = "<frozen importlib"
"""Beginning of the file names of Python's own code that imports modules."""

AGAIN = b"\0"
"""Message to the thread that sends it; other bytes are the numbers of signals."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


class ClosedPipe(Exception):
    """Standard output that nobody reads any more."""


@contextlib.contextmanager
def closed_pipe() -> Iterator[None]:
    """Tell the libraries' ways to end apart from others, where nobody reads standard output any more.

    Raises:
        ClosedPipe: nobody does.
    """
    try:
        yield
    except BrokenPipeError as error:
        raise ClosedPipe from error
    except SystemExit as end:
        # rich catches the error, and leaves.
        if isinstance(end.__context__, BrokenPipeError):
            raise ClosedPipe from end
        raise


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Within the block, Ctrl-C is a KeyboardInterrupt that is not lost, and a second one always ends the process.

    Python ignores what is raised in a callback of the garbage collector (JAX has one) or in a ``__del__``: the
    interrupt then comes again. While a module is imported it waits: an extension whose start is interrupted gives an
    ImportError, or ends the process by a segmentation fault. While the main thread is inside a compiler it handles
    none: a second one then ends the process from another thread. Where Ctrl-C is ignored, as in a shell's background
    job, it stays so.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield
        return
    seen = handled = 0
    ended = False

    def on_signal(_: int, frame: FrameType | None) -> None:
        nonlocal handled
        handled += 1
        while frame is not None:
            # There it would be lost once more, and this time for good; here it would leave half a module.
            if frame.f_code is on_unraisable.__code__ or frame.f_code.co_filename.startswith(IMPORTING):
                writer.send(AGAIN)
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    def on_unraisable(event: Any, /) -> None:
        if issubclass(event.exc_type, KeyboardInterrupt):
            # To the other thread: raised from here, it would be ignored, too.
            writer.send(AGAIN)
        else:
            hook_before(event)

    def watch() -> None:
        nonlocal seen
        with reader:
            while numbers := reader.recv(16):
                if AGAIN in numbers:
                    time.sleep(RETRY_S)
                    if not ended:
                        _interrupt_main()
                for number in numbers:
                    # A server has a handler of its own meanwhile, which counts for itself.
                    seen += number == signal.SIGINT and signal.getsignal(signal.SIGINT) is on_signal
                    if seen > handled + 1:
                        os._exit(STOPPED)

    reader, writer = socket.socketpair()
    writer.setblocking(False)
    handler_before = signal.signal(signal.SIGINT, on_signal)
    hook_before: Callable[[Any], Any] = sys.unraisablehook
    sys.unraisablehook = on_unraisable
    # C code writes to it when a signal comes, whatever the main thread does.
    fd_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="jllm-interrupts", daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        _cancel_timers()
        raise
    finally:
        ended = True
        signal.set_wakeup_fd(fd_before)
        signal.signal(signal.SIGINT, handler_before)
        sys.unraisablehook = hook_before
        writer.close()
        thread.join()


def _cancel_timers() -> None:
    """Cancel what is to run later. Python would wait for it: JAX, where it is interrupted, leaves one of 60 seconds."""
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.cancel()


def _interrupt_main() -> None:
    # A real signal where there are such, which a main thread that waits for something hears at once.
    if hasattr(signal, "pthread_kill") and (ident := threading.main_thread().ident) is not None:
        signal.pthread_kill(ident, signal.SIGINT)
    else:
        _thread.interrupt_main()


def has_all_letters(stream: object) -> bool:
    """Whether a stream's encoding has every character."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")


def write_any_letter() -> None:
    """Write what the encoding of the standard streams has not as ``\\u6f22``, instead of failing.

    C locales have an encoding without most letters. A lone surrogate, as of a file name that is not UTF-8, is in none.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def leave_where_unwritable() -> Iterator[None]:
    """Leave the process where standard output takes no more within the block: quietly where nobody reads it, with a
    sentence where it is full."""
    try:
        yield
    except (BrokenPipeError, ClosedPipe):
        _drop_output()
        sys.exit(CLOSED_PIPE)
    except OSError as error:
        if not _is_full_output(error):
            raise
        _drop_output()
        print(f"Error: the output cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(FAILED)


def _drop_output() -> None:
    """Let what is still to be written to standard output go nowhere, so that Python does not try at its end."""
    # A test's stream has no file behind it.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _is_full_output(error: OSError) -> bool:
    """Whether standard output takes no more: a full disk, or a device like ``/dev/full``."""
    # An error of any other file says which one.
    return error.errno in _FULL and error.filename is None
