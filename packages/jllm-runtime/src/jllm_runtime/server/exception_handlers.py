"""FastAPI exception handlers: every error in the shape of OpenAI's error object."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from jllm_runtime.errors import EngineError, NonfiniteError, RequestError
from jllm_runtime.server.errors import CLIENT_CLOSED_REQUEST, ApiError, ClientDisconnectedError, as_api_error
from jllm_runtime.server.requests.ignored_fields import as_sent


def add_exception_handlers(app: FastAPI) -> None:
    """Install the handlers of all errors that requests can end with."""

    async def handle_error(request: Request, error: Exception) -> Response:
        return as_sent(as_api_error(error), request.scope).response()

    async def handle_validation_error(request: Request, error: Exception) -> Response:
        if not isinstance(error, RequestValidationError):
            raise error
        message, code, param = describe_validation_errors(error.errors(), error.body)
        return as_sent(ApiError(400, message, code, param), request.scope).response()

    async def handle_http_exception(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        return _as_api_error(request, error).response()

    async def handle_disconnect(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    # ApiError is an HTTPException too; Starlette takes the handler of the nearest class in the error's MRO.
    for kind in (ApiError, RequestError, EngineError, NonfiniteError, Exception):
        app.add_exception_handler(kind, handle_error)
    # FastAPI would answer with 422 and a body of its own.
    app.add_exception_handler(RequestValidationError, handle_validation_error)
    app.add_exception_handler(HTTPException, handle_http_exception)
    app.add_exception_handler(ClientDisconnectedError, handle_disconnect)


def _as_api_error(request: Request, error: HTTPException) -> ApiError:
    """The API error for an error of the routing: unknown paths and methods."""
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ApiError(404, f"there is no {where}; GET /openapi.json lists what there is", "unknown_url")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "other methods")
        message = f"{where} is not allowed, {allowed} is"
        return ApiError(405, message, "method_not_allowed", headers=error.headers)
    return ApiError(error.status_code, str(error.detail), headers=error.headers)


def describe_validation_errors(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[str, str, str | None]:
    """One message for pydantic's list of errors: message, code, and field, such as ``messages[0].content``.

    A field that takes several types (a union) has an error for each of them. The type that the client meant is the one
    whose errors are about more than the type, and of those the one whose error lies deepest in the body.
    """
    paths = [_path(error, body) for error in errors]
    chosen = max(range(len(errors)), key=lambda at: (not errors[at]["type"].endswith("_type"), len(paths[at]), -at))
    error, param = errors[chosen], _as_text(paths[chosen]) or None
    if not paths[chosen]:
        return "the body must be a JSON object", "invalid_type", None
    # The texts of pydantic, which name Python's types, are used only where the value is wrong.
    if error["type"] == "extra_forbidden":
        return f"there is no parameter {param}", "unknown_parameter", param
    if error["type"] == "missing":
        return f"{param} is missing", "missing_required_parameter", param
    if error["type"].startswith("union_tag_"):
        # The field that tells which of several objects it is; pydantic's error is that of the whole object.
        param = f"{param}.{error['ctx']['discriminator'].strip(chr(39))}"
        if error["type"] == "union_tag_not_found":
            return f"{param} is missing", "missing_required_parameter", param
        expected, given = error["ctx"]["expected_tags"], error["ctx"]["tag"]
        return f"{param}: should be one of {expected}, got {given!r:.80}", "invalid_value", param
    same_path = [other for other, path in zip(errors, paths, strict=True) if path == paths[chosen]]
    expected = " or ".join(dict.fromkeys(_expected(other["msg"]) for other in same_path))
    # A whole object in the message would hide the point.
    given = "" if isinstance(error["input"], dict | list) else f", got {error['input']!r:.80}"
    return f"{param}: {expected}{given}", "invalid_value", param


def _expected(message: str) -> str:
    return message.removeprefix("Value error, ").removeprefix("Input ")


def _path(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """Keys and indices from the body to the error.

    Pydantic's ``loc`` also has the names of a union's members, which are no keys of the body: they are left out.
    """
    path: list[str | int] = []
    value = body
    steps = error["loc"][1:]  # the first is "body"
    for number, step in enumerate(steps):
        # Follow the step where the body has it.
        if (isinstance(value, dict) and step in value) or (
            isinstance(value, list) and isinstance(step, int) and step < len(value)
        ):
            value = value[step]
            path.append(step)
        # A missing field is not in the body, and still a part of its path.
        elif error["type"] == "missing" and number == len(steps) - 1 and isinstance(value, dict):
            path.append(step)
    return path


def _as_text(path: list[str | int]) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")
