"""ASGI middleware: request ids, request counts, unhandled errors."""

import logging
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jllm_runtime.server.errors import CLIENT_CLOSED_REQUEST, as_api_error
from jllm_runtime.server.metrics import Metrics

logger = logging.getLogger(__name__)


class RequestMetricsMiddleware:
    """Request counter. It gives each request an id and answers errors that nothing inside has handled.

    Args:
        app: the next application.
        metrics: counts the requests.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Without a response, the client has gone.
        request_id, status = f"req_{uuid.uuid4().hex}", CLIENT_CLOSED_REQUEST

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers.setdefault("X-Content-Type-Options", "nosniff")
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            # Starlette answers with an error and raises it again: then the traceback is in the log already.
            logger.error("%s failed: %s %s", request_id, scope["method"], scope["path"])
            if status == CLIENT_CLOSED_REQUEST:
                await as_api_error(error).response()(scope, receive, send_with_headers)
        finally:
            # The route's pattern, not the path: clients could fill the registry with paths.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.http_requests.labels(route, str(status)).inc()
