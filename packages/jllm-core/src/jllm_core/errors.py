"""The one base class of every error that a JLLM package raises for bad input."""


class JLLMError(Exception):
    """Bad input, told in full: what is wrong, where, what was expected and what came, and what to do.

    Commands print the message without a traceback and exit with ``exit_code``.
    """

    exit_code = 2  # a subclass has 1, where the input is good and the same may succeed another time


def reason(error: Exception) -> str:
    """The text of an error; that of an OSError without its path, which the message around it gives already."""
    return getattr(error, "strerror", None) or str(error)
