"""A Hugging Face hub of one thread a request, on this machine, for tests: repositories that can misbehave on order."""

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".gguf", ".bin")
"""Files with these endings are in the large-file storage: the hub gives their SHA-256."""


@dataclass
class Request:
    """What was asked, and how many bytes of a file the answer had."""

    method: str
    path: str
    headers: dict[str, str]
    sent: int = 0

    @property
    def file(self) -> str:
        """The name of the file that was asked for; empty for anything else."""
        return self.path.partition("/resolve/")[2].partition("/")[2]


@dataclass
class Repo:
    """A repository: its commits, what its branches and tags mean, and who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit and move the branch to it."""
        sha = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """The hub. As a context manager it answers until the end of the block, and no thread of it lives longer.

    Attributes:
        repos: by ``owner/name``.
        tokens: whom gated and private repositories let in.
        requests: what was asked so far.
        cut_after: the connection breaks after so many bytes of the body, for each file named; a list is used up,
            one number a request.
        hold_after: like ``cut_after``, but the connection stays open and silent until ``release``.
        served: contents to send in the place of a file's own.
        answers: status, headers and body to give for a path instead of its own; a list is used up.
        elsewhere: the address of another server to which requests for large files are sent.
        ranges: whether requests for a part of a file get that part.
        edit_listing: changes the listing of a repository before it is sent.
        after_listing: called once a listing was sent.
    """

    daemon_threads = False
    block_on_close = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.tokens: set[str] = set()
        self.requests: list[Request] = []
        self.cut_after: dict[str, int | list[int]] = {}
        self.hold_after: dict[str, int] = {}
        self.served: dict[str, bytes] = {}
        self.answers: dict[str, tuple[int, dict[str, str], bytes] | list[tuple[int, dict[str, str], bytes]]] = {}
        self.elsewhere: str | None = None
        self.ranges = True
        self.edit_listing: Callable[[dict[str, Any]], None] = lambda listing: None
        self.after_listing: Callable[[], None] = lambda: None
        self._release = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def release(self) -> None:
        """End the silence of ``hold_after``, for good."""
        self._release.set()

    def wait_for_release(self) -> None:
        self._release.wait(30)

    def add(self, name: str, files: dict[str, bytes]) -> str:
        """Add a repository with one commit on main, and return the commit."""
        self.repos[name] = Repo()
        return self.repos[name].commit(files)

    def asked(self, method: str | None = None) -> list[str]:
        """The files that were asked for, sorted."""
        return sorted(r.file for r in self.requests if r.file and method in (None, r.method))

    def sent(self, file: str) -> int:
        """The bytes of a file that were sent so far."""
        return sum(request.sent for request in self.requests if request.file == file)


class _Handler(BaseHTTPRequestHandler):
    """One connection, one request: HTTP/1.0, so that nothing waits for another request when the server ends."""

    server: HubServer
    asked: Request

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked = Request(self.command, path, {name.lower(): value for name, value in self.headers.items()})
        self.server.requests.append(self.asked)
        answer = self.server.answers.get(path)
        if isinstance(answer, list):
            answer = answer.pop(0) if answer else None
        if answer is not None:
            self.reply(*answer)
        elif path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            self.listing(name, revision or "main")
        elif path.startswith("/contents/"):
            key, _, name = path.removeprefix("/contents/").partition("/resolve/x/")
            self.file(name, self.content_of(key), {})
        else:
            name, _, rest = path[1:].partition("/resolve/")
            self.resolve(name, *rest.split("/", 1))

    def repo(self, name: str, files: bool) -> Repo | None:
        """The repository, if it may be read; else the answer is given."""
        repo = self.server.repos.get(name)
        known = self.asked.headers.get("authorization", "").removeprefix("Bearer ") in self.server.tokens
        if repo is None or (repo.private and not known):
            self.fail(404 if known else 401, "RepoNotFound", "Repository not found")
        elif repo.gated and files and not known:
            self.fail(403, "GatedRepo", "Access to this model is restricted")
        else:
            return repo
        return None

    def listing(self, name: str, revision: str) -> None:
        if (repo := self.repo(name, files=False)) is None:
            return
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        listing = {"id": name, "sha": sha, "siblings": [sibling(*item) for item in repo.commits[sha].items()]}
        self.server.edit_listing(listing)
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())
        self.server.after_listing()

    def resolve(self, name: str, revision: str = "", file: str = "") -> None:
        if (repo := self.repo(name, files=True)) is None:
            return
        sha = repo.branches.get(revision, revision)
        content = repo.commits.get(sha, {}).get(file)
        if content is None:
            self.fail(404, "EntryNotFound", f"{file} is not here")
            return
        key = sibling(file, content).get("lfs", {}).get("sha256")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{key or git_hash(content)}"'}
        if key is not None:
            headers |= {"X-Linked-Etag": f'"{key}"', "X-Linked-Size": str(len(content))}
            if self.server.elsewhere is not None:
                location = f"{self.server.elsewhere}/contents/{key}/resolve/x/{file}"
                self.reply(302, {**headers, "Location": location}, b"")
                return
        self.file(file, content, headers)

    def content_of(self, key: str) -> bytes:
        """The content of a hash, which the servers of large files give to anyone who knows it."""
        everything = (
            c for repo in self.server.repos.values() for files in repo.commits.values() for c in files.values()
        )
        return next(content for content in everything if hashlib.sha256(content).hexdigest() == key)

    def file(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        content = self.server.served.get(name, content)
        start, stop, status = 0, len(content), 200
        if "range" in self.asked.headers and self.server.ranges:
            first, _, last = self.asked.headers["range"].removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(int(last or len(content)) + 1, len(content)), 206
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        body = content[start:stop]
        cut = self.server.cut_after.get(name, len(body))
        if isinstance(cut, list):
            cut = cut.pop(0) if cut and self.command == "GET" else len(body)
        hold = self.server.hold_after.get(name, len(body))
        first = min(cut, hold)
        self.reply(status, headers, body[:first], length=len(body))
        if self.command == "GET" and hold < min(cut, len(body)):
            self.server.wait_for_release()
            self.write(body[first:cut])

    def reply(self, status: int, headers: dict[str, str], body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        for header, value in {"Content-Length": str(len(body) if length is None else length), **headers}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.write(body)

    def write(self, body: bytes) -> None:
        try:
            for start in range(0, len(body), 2**16):
                # Counted first: the client may be done with them before this thread goes on.
                self.asked.sent += len(body[start : start + 2**16])
                self.wfile.write(body[start : start + 2**16])
        except OSError:  # the client went away
            self.close_connection = True

    def fail(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
        self.reply(status, headers, json.dumps({"error": message}).encode())


def sibling(name: str, content: bytes) -> dict[str, Any]:
    """A file in a listing with ``?blobs=true``."""
    entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_hash(content)}
    if name.endswith(LARGE):
        sha256 = hashlib.sha256(content).hexdigest()
        entry |= {"blobId": git_hash(b"pointer"), "lfs": {"sha256": sha256, "size": len(content), "pointerSize": 134}}
    return entry
