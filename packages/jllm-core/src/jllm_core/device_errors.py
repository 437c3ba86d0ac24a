"""Errors of JAX's start: a platform that is not there, a broken plug-in, a setting that is none; each one sentence."""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from types import TracebackType

from jllm_core.errors import JLLMError

# JAX's modules that start the devices and read the settings. It raises errors of general types.
_DEVICES, _SETTINGS = "jax._src.xla_bridge", "jax._src.config"
_FAILED = re.compile(
    r"Unable to initialize backend '(?P<platform>.*?)': (?P<cause>.*?)( \((set|you may).*)?", re.DOTALL
)

_DO_WITHOUT_NAME = "unset the variable to run on what is there, or name another platform, such as cpu"


class DeviceError(JLLMError):
    """Devices that JAX cannot start."""


@contextlib.contextmanager
def device_errors() -> Iterator[None]:
    """Within the block, what keeps JAX from starting is a DeviceError.

    So is a plug-in that fails, unless JAX_PLATFORMS says what to run on: JAX would log a traceback, and run on the CPU.

    Raises:
        DeviceError: JAX does not start.
    """
    logger = logging.getLogger(_DEVICES)
    logger.addFilter(_refuse_broken_plugin)
    try:
        yield
    except (RuntimeError, AssertionError, ValueError) as error:
        if (message := _message(error)) is None:
            raise
        raise DeviceError(message) from error
    finally:
        logger.removeFilter(_refuse_broken_plugin)


def _message(error: Exception) -> str | None:
    """What is wrong and what to do; None where the error is another."""
    text, named = str(error), _named_platforms()
    if found := _FAILED.fullmatch(text):
        cause = _first_line(found["cause"])
        if named:
            return f"JAX cannot start what JAX_PLATFORMS={named} names: {cause}; {_DO_WITHOUT_NAME}"
        return f"JAX cannot start its platform {found['platform']!r}: {cause}; set JAX_PLATFORMS=cpu to do without it"
    module = _module_of(error.__traceback__)
    if module == _DEVICES and isinstance(error, AssertionError):
        return f"there is no device of JAX_PLATFORMS={named}; {_DO_WITHOUT_NAME}"
    if module == _SETTINGS and isinstance(error, ValueError):
        return f"JAX refuses a setting in the environment: {_first_line(text)}"
    return None


def _refuse_broken_plugin(record: logging.LogRecord) -> bool:
    """Filter of JAX's log."""
    if "plugin configuration error" not in str(record.msg):
        return True
    # Who has named platforms does not wait for others; where it is the broken one, JAX then misses it.
    if _named_platforms():
        return False
    name = str(record.args[0]) if record.args and isinstance(record.args, tuple) else "of an accelerator"
    error = record.exc_info[1] if record.exc_info else None
    cause = f": {_first_line(str(error) or type(error).__name__)}" if error else ""
    raise DeviceError(
        f"JAX's plug-in {name} does not start{cause}; install it anew or remove it, or set JAX_PLATFORMS=cpu to do "
        "without it"
    )


def _named_platforms() -> str:
    """The value of JAX_PLATFORMS, or what an option has put in its place."""
    return str(sys.modules["jax"].config.jax_platforms or "") if "jax" in sys.modules else ""


def _module_of(traceback: TracebackType | None) -> str:
    """The module that raised an error."""
    name = ""
    while traceback is not None:
        name, traceback = str(traceback.tb_frame.f_globals.get("__name__")), traceback.tb_next
    return name


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].rstrip(".") if text.strip() else "no reason given"
