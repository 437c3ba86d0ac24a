"""Endpoint: GET / and /static, the web page."""

import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import APIRouter, Request, Response

STYLES = ("base.css", "chat.css", "glass.css", "layout.css", "panel.css")
MODULES = (
    *("address.js", "answer.js", "api.js", "blocks.js", "chart.js", "chat.js", "composer.js", "defaults.js"),
    *("dialog.js", "drafts.js", "drawer.js", "element.js", "emphasis.js", "engine.js", "events.js", "glass.js"),
    *("inline.js", "inspector.js", "main.js", "markdown.js", "message.js", "models.js", "notice.js", "parameters.js"),
    *(
        "question.js",
        "scroll.js",
        "sidebar.js",
        "store.js",
        "theme.js",
        "timeline.js",
        "token.js",
        "versions.js",
        "watch.js",
    ),
)
FILES = {
    "index.html": "text/html",
    "icon.svg": "image/svg+xml",
    **dict.fromkeys(STYLES, "text/css"),
    **dict.fromkeys(MODULES, "text/javascript"),
}
"""All files of the page with their media types. Only these are served."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    # No script may write markup, so that a model's output becomes text and never elements of its choosing.
    "require-trusted-types-for 'script'; trusted-types 'none'"
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # the browser asks each time, and gets 304 while its copy is current
}


def page_router() -> APIRouter:
    """Router of the page at ``/`` and its files at ``/static/NAME``.

    The files are read here, once: no request reaches the file system, and no path of a request is looked up in it.
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
