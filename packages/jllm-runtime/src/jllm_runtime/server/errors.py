"""What a client is told when it cannot be answered: a status, and OpenAI's error object."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.responses import Response

from jllm_runtime.errors import EngineError, QueueFullError, RequestError
from jllm_runtime.sampling import SamplingParams
from jllm_runtime.server.validation import first_error

RETRY_AFTER = {"Retry-After": "1"}
"""The header that tells a client to come again, and in how many seconds."""

CLIENT_GONE = 499
"""The status of a request whose client has hung up: nobody reads it, but it is counted."""

logger = logging.getLogger(__name__)


class ApiError(HTTPException):
    """A request that ends with an error. FastAPI lets its own HTTPException through wherever it is raised.

    Args:
        status: of HTTP.
        message: for people.
        code: for programs.
        param: the parameter that is to blame, such as ``messages[0].content``.
        headers: of HTTP.
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
        """The object that the OpenAI API answers with."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status_code >= 500 else kinds.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer that says so."""
        return JSONResponse(self.body, self.status_code, self.headers)


class ClientGoneError(Exception):
    """The client has hung up."""


def draining_error() -> ApiError:
    """The server is told to end."""
    return ApiError(503, "the server is shutting down", "shutting_down", headers=RETRY_AFTER)


def timeout_error(seconds: float) -> ApiError:
    """The server gives up."""
    return ApiError(503, f"the answer has taken more than {seconds:g} s", "timeout")


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an exception. What nobody has foreseen goes to the log, and not to the client."""
    if isinstance(error, ApiError):
        return error
    cause = error.__cause__ if isinstance(error, EngineError) else None
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), "queue_full", headers=RETRY_AFTER)
    if isinstance(error, RequestError) or isinstance(cause, RequestError):
        return ApiError(400, str(error), "invalid_value", _blamed(str(error)))
    logger.error("a request failed", exc_info=error)
    if isinstance(error, EngineError):
        return ApiError(500, "the engine could not finish the answer; the server's log says why", "engine_error")
    return ApiError(500, "the server failed; its log says why", "internal_error")


def install_handlers(app: FastAPI) -> None:
    """Let every error of the app have OpenAI's shape."""

    async def failed(_: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def invalid(_: Request, error: Exception) -> Response:
        if not isinstance(error, RequestValidationError):
            raise error
        message, code, param = first_error(error.errors(), error.body)
        return ApiError(400, message, code, param).response()

    async def refused(request: Request, error: Exception) -> Response:
        if not isinstance(error, AnyHTTPException):
            raise error
        return _http_error(request, error).response()

    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    for kind in (ApiError, RequestError, EngineError, Exception):
        app.add_exception_handler(kind, failed)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(AnyHTTPException, refused)
    app.add_exception_handler(ClientGoneError, gone)


def _http_error(request: Request, error: AnyHTTPException) -> ApiError:
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ApiError(404, f"there is no {where}; GET /openapi.json lists what there is", "unknown_url")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "other methods")
        message = f"{where} is not allowed, {allowed} is"
        return ApiError(405, message, "method_not_allowed", headers=error.headers)
    return ApiError(error.status_code, str(error.detail), headers=error.headers)


def _blamed(message: str) -> str | None:
    """The sampling parameter that a RequestError begins with."""
    name = message.split(" ", 1)[0]
    return name if name in SamplingParams.__dataclass_fields__ else None
