"""API errors: HTTP status and OpenAI's error object."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from jllm_runtime.errors import EngineError, NonfiniteError, QueueFullError, RequestError
from jllm_runtime.sampling import SamplingParams

RETRY_AFTER = {"Retry-After": "1"}
"""Header that tells a client after how many seconds it may try again."""

CLIENT_CLOSED_REQUEST = 499
"""Status for a client that has disconnected (nginx's number). Nobody reads it, but metrics count it."""

logger = logging.getLogger(__name__)


class ApiError(HTTPException):
    """An error response. It is an HTTPException because FastAPI passes that on wherever it is raised.

    Args:
        status: HTTP status.
        message: the error in words.
        code: the error for programs, such as ``queue_full``.
        param: the field of the request that is wrong, such as ``messages[0].content``.
        headers: further HTTP headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message = message
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object: ``{"error": {"message", "type", "param", "code"}}``."""
        # The types that OpenAI's clients know.
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status_code >= 500 else kinds.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body, self.status_code, self.headers)


class ClientDisconnectedError(Exception):
    """The client has closed the connection."""


def shutting_down_error() -> ApiError:
    """The error of requests that the server's shutdown refuses or ends."""
    return ApiError(503, "the server is shutting down", "shutting_down", headers=RETRY_AFTER)


def timeout_error(seconds: float) -> ApiError:
    """The error of a request that has taken longer than ``--request-timeout``."""
    return ApiError(504, f"the answer has taken more than {seconds:g} s", "timeout")


def as_api_error(error: Exception) -> ApiError:
    """The API error for any exception. The text of an unforeseen one goes to the log, never to the client."""
    if isinstance(error, ApiError):
        return error
    cause = error.__cause__ if isinstance(error, EngineError) else None
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), "queue_full", headers=RETRY_AFTER)
    # What fails on the engine's thread, such as a grammar that does not compile, comes as the cause of an EngineError.
    if isinstance(error, RequestError) or isinstance(cause, RequestError):
        return ApiError(400, str(error), "invalid_value", _sampling_param(str(error)))
    logger.error("a request failed", exc_info=error)
    if isinstance(error, NonfiniteError) or isinstance(cause, NonfiniteError):
        return ApiError(500, str(error), "nonfinite_numbers")
    if isinstance(error, EngineError):
        return ApiError(500, "the engine could not finish the answer; the server's log says why", "engine_error")
    return ApiError(500, "the server failed; its log says why", "internal_error")


def _sampling_param(message: str) -> str | None:
    """The sampling parameter that a RequestError is about: its messages begin with the name."""
    name = message.split(" ", 1)[0]
    return name if name in SamplingParams.__dataclass_fields__ else None
