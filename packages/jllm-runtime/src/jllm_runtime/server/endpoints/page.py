"""The web page: its files, and the router that serves them."""

import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import APIRouter, Request, Response

STYLES = ("base.css", "chat.css", "glass.css", "layout.css", "panel.css")
MODULES = (
    *("answer.js", "api.js", "blocks.js", "chart.js", "chat.js", "composer.js", "dialog.js"),
    *("drawer.js", "element.js", "emphasis.js", "engine.js", "events.js", "glass.js", "inline.js", "inspector.js"),
    *("main.js", "markdown.js", "message.js", "models.js", "parameters.js", "scroll.js", "sidebar.js"),
    *("store.js", "theme.js", "token.js"),
)
FILES = {
    "index.html": "text/html",
    "icon.svg": "image/svg+xml",
    **dict.fromkeys(STYLES, "text/css"),
    **dict.fromkeys(MODULES, "text/javascript"),
}
"""Every file there is to serve, with its type. A name that is not here is not looked for."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    # No script may write markup: what a model says becomes text, never elements of its choosing.
    "require-trusted-types-for 'script'; trusted-types 'none'"
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # a browser asks each time, and gets 304 while the file is the same
}


def page_router() -> APIRouter:
    """A router for the page at ``/`` and its files at ``/static/NAME``.

    The files are read here, once; no request reaches the file system.
    """
    router = APIRouter()
    folder = resources.files("jllm_runtime.server") / "static"
    for name, media_type in FILES.items():
        path = "/" if name == "index.html" else f"/static/{name}"
        endpoint = _endpoint((folder / name).read_bytes(), f"{media_type}; charset=utf-8")
        router.add_api_route(path, endpoint, methods=["GET", "HEAD"], include_in_schema=False)
    return router


def _endpoint(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    headers = {**HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    async def serve(request: Request) -> Response:
        if request.headers.get("If-None-Match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return serve
