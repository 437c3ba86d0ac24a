"""What every request has around it: a number, a place in the metrics, and headers that browsers heed."""

import logging
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jllm_runtime.server.errors import CLIENT_GONE, as_api_error
from jllm_runtime.server.metrics import Metrics

logger = logging.getLogger(__name__)


class Watch:
    """ASGI middleware, around all that answers: counts requests, and answers for what nobody has foreseen.

    Args:
        app: what follows.
        metrics: where they are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        number, status = f"req_{uuid.uuid4().hex}", CLIENT_GONE

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = number
                headers.setdefault("X-Content-Type-Options", "nosniff")
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except Exception as error:
            # Whoever has begun to answer has told the log what went wrong.
            logger.error("%s failed: %s %s", number, scope["method"], scope["path"])
            if status == CLIENT_GONE:
                await as_api_error(error).response()(scope, receive, send_on)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.http_requests.labels(route, str(status)).inc()
