"""Web page: its files as they are served. Their tests in a browser are in tests/e2e/page."""

import asyncio
import re
from importlib import resources

import pytest
from fastapi import FastAPI
from jllm_runtime.server.endpoints.web_page import FILES, page_router

STATIC = resources.files("jllm_runtime.server") / "static"
LARGEST = 160_000  # bytes, all files together
PATHS = {name: "/" if name == "index.html" else f"/static/{name}" for name in FILES}


def get(path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """What the page answers, asked without a network."""
    app = FastAPI(openapi_url=None)
    app.include_router(page_router())
    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request", "body": b""}

    async def send(message: dict) -> None:
        sent.append(message)

    raw = [(name.replace("_", "-").lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": raw}
    asyncio.run(app({**scope, "query_string": b"", "root_path": "", "scheme": "http"}, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:])


def text(name: str) -> str:
    return (STATIC / name).read_text()


@pytest.mark.parametrize("name", FILES)
def test_file_is_served_as_it_is_and_under_the_policy(name: str) -> None:
    status, headers, body = get(PATHS[name])
    assert (status, body) == (200, (STATIC / name).read_bytes())
    assert headers["content-type"] == f"{FILES[name]}; charset=utf-8"
    assert headers["x-content-type-options"] == "nosniff"
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        **dict.fromkeys(("script-src", "style-src", "connect-src"), "'self'"),
        "img-src": "'self' data:",
        **dict.fromkeys(("base-uri", "form-action", "frame-ancestors"), "'none'"),
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }


def test_same_file_is_not_sent_again() -> None:
    _, headers, _ = get("/")
    assert get("/", If_None_Match=headers["etag"])[0::2] == (304, b"")
    assert get("/", If_None_Match='"another"')[0] == 200
    assert get("/", method="HEAD")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/static/", "/static", "/index.html", "/static/index.html", "/static/../app.py", "/static/..%2fapp.py"),
        *(
            "/static//etc/passwd",
            "/static/%2e%2e/app.py",
            "/static/api.js/",
            "/static/api.js\0",
            "/static/..\\app.py",
        ),
    ],
)
def test_nothing_else_is_found(path: str) -> None:
    assert get(path)[0] in (307, 404)  # 307: to the same path without a slash at its end


def test_table_is_the_folder() -> None:
    assert {file.name for file in STATIC.iterdir()} == set(FILES)


def test_page_is_small() -> None:
    assert sum(len((STATIC / name).read_bytes()) for name in FILES) < LARGEST


def test_page_names_only_files_that_there_are() -> None:
    html = text("index.html")
    assert {f"static/{name}" for name in FILES} >= set(re.findall(r'(?:src|href)="(?!#)([^"]+)"', html))
    for name in FILES:
        for found in re.findall(r'from "\./([^"]+)"', text(name)):
            assert found in FILES, f"{name} imports {found}"


def test_page_has_nothing_inline_and_nothing_from_elsewhere() -> None:
    html = text("index.html")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    for name in FILES:
        # The one address is SVG's name; markdown's own patterns hold the scheme without a host.
        assert set(re.findall(r"https?://[\w.]+", text(name))) <= {"http://www.w3.org"}
        assert not re.search(r"@import|url\(", text(name))


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_scripts_build_nodes_never_markup(name: str) -> None:
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function|setAttribute\(\"style"
    )
    assert not re.search(forbidden, text(name))
    assert len(text(name).splitlines()) <= 250
