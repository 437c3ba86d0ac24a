"""Exceptions of the runtime, and the check of texts that all input goes through."""

from jllm_core.errors import JLLMError


class ModelError(JLLMError):
    """Model that cannot be found, resolved or loaded."""


class DistributedError(JLLMError):
    """Processes that cannot be named, found or joined, or that do not run the same."""


class MeshError(JLLMError):
    """Device mesh that cannot be made of the devices at hand."""


class RequestError(JLLMError):
    """Prompt or parameter that cannot be honoured."""


def check_text(text: str, name: str) -> None:
    """Refuse a text that is no valid Unicode, with the place: half of a surrogate pair, which no tokenizer takes.

    Python keeps such halves for what a JSON escape spells, and for bytes of the command line that its locale cannot
    read.

    Args:
        text: the text.
        name: the text in the message.

    Raises:
        RequestError: there is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, at = ord(text[error.start]), error.start
        # Python's own use of this range: one stands for a byte that could not be read as text.
        is_byte = 0xDC80 <= code <= 0xDCFF
        found = f"the byte 0x{code - 0xDC00:02X}" if is_byte else f"half of a surrogate pair (U+{code:04X})"
        remedy = "; a locale of UTF-8 reads it, as with LC_ALL=C.UTF-8" if is_byte else ""
        near = ascii(text[max(at - 20, 0) : at + 20])
        raise RequestError(
            f"{name} is not valid text: character {at + 1} is {found}, in {near}; expected Unicode{remedy}"
        ) from error


class NonfiniteError(JLLMError):
    """Results of a model that are NaN or infinite; ``results`` begins the message."""

    def __init__(self, results: str) -> None:
        super().__init__(
            f"{results} are NaN or infinite: the model's weights are damaged or hold such numbers, or what is computed "
            "from them grows too large, as it may in float16 beyond 65,504 (--dtype bfloat16 has room). jllm-convert "
            "verify finds damage, and a new conversion names the tensors that hold such numbers; where neither finds "
            "any, the model itself computes them"
        )


class PlanError(JLLMError):
    """Plan that cannot be made: an unknown machine or model, or a compiler that is not there."""


class CacheError(JLLMError):
    """Cache folder that cannot be read, or a part of it that is not there or cannot be removed."""


class EngineError(JLLMError):
    """Request that the engine could not finish, or cannot take because it is closed."""


class QueueFullError(EngineError):
    """Full queue: ``max_queue`` answers wait already. The request may come again later."""


class ServerError(JLLMError):
    """Server that cannot be started as asked, or that a client cannot talk with."""
