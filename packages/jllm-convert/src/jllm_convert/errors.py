"""Errors of a conversion."""

from collections.abc import Sequence

from jllm_core.errors import JLLMError


class ConversionError(JLLMError):
    """A conversion that fails, with every problem that was found, not only the first.

    Attributes:
        problems: a sentence for each problem: what is wrong, where, what was expected and what was found.
    """

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            lines = "\n".join(f"  {number}. {text}" for number, text in enumerate(self.problems, start=1))
            message = f"{len(self.problems)} problems:\n{lines}"
        super().__init__(message)


class DestinationError(ConversionError):
    """A destination that cannot be written: no room, no permission, a file in a folder's place."""

    exit_code = 1


class DownloadError(ConversionError):
    """A download that fails on the way or at the hub, so that another try may succeed."""

    exit_code = 1


class BusyError(ConversionError):
    """A destination that another process is converting to."""

    exit_code = 1
