"""Hub repository at one commit: its files, and resumable downloads of them.

huggingface_hub finds the hub, the token and the kind of an error. The downloads are requests of our own over its
session: its own downloads keep nothing of a file when the process is stopped, and one file may be the whole model.
"""

import contextlib
import importlib
import io
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event
from typing import Any

from jllm_convert.__about__ import __version__
from jllm_convert.errors import ConversionError, DownloadError
from jllm_convert.hub.remote_file import COMMIT, PartialDownload, RemoteFile, remote_file, stays_inside

# The ending of a partial download's name. `hf cache` counts and clears files with the ending .incomplete.
PARTIAL_SUFFIX = ".jllm.incomplete"
# Seconds to wait after each attempt that brings nothing. A single new byte starts the list again.
WAITS: Sequence[float] = (1, 2, 4, 8)
_FILES_AT_ONCE = 4
_LISTING_SECONDS = 30
_MAX_IN_MEMORY = 64 * 2**20


class Repository:
    """A repository, at the commit that its revision had when this was created. Nothing is written until ``fetch``.

    Args:
        repo: ``owner/name``.
        revision: a branch, a tag or a commit.

    Raises (on opening):
        ConversionError: there is no such repository or revision, access is denied, the hub cannot be reached, or its
            answer names files outside the repository.
    """

    def __init__(self, repo: str, revision: str) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        api = HfApi(library_name="jllm-convert", library_version=__version__)
        self.repo = repo
        self.url = f"{api.endpoint}/{repo}"
        try:
            self._headers = build_hf_headers(library_name="jllm-convert", library_version=__version__)
        except OSError as error:
            raise ConversionError(
                f"the hub's token cannot be read ({error}); set HF_HOME to a folder that can be read and written"
            ) from error
        self._in_memory: dict[str, bytes] = {}
        with self._translated_errors(revision):
            try:
                # Any host can stand behind HF_ENDPOINT, so the answer's form is checked as well.
                info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_LISTING_SECONDS)
                listed = [remote_file(each) for each in info.siblings or ()]
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ConversionError(
                    f"{api.endpoint} does not answer as a Hugging Face hub does about {repo} ({error}); expected the "
                    "names, sizes and hashes of its files. Check HF_ENDPOINT, and what stands between you and the hub"
                ) from error
        # The commit becomes the name of a folder, and all files are requested at it, whatever happens to the branch.
        if not COMMIT.fullmatch(str(info.sha)) or (COMMIT.fullmatch(revision) and info.sha != revision):
            raise ConversionError(f"{self.url}: revision {revision!r} should be a commit, the hub answers {info.sha!r}")
        self.commit = str(info.sha)
        hostile = [file.name for file in listed if not stays_inside(file.name)]
        if hostile:
            raise ConversionError(
                f"{self.url} names files that would be written outside their folder, so nothing is "
                f"downloaded: {', '.join(map(repr, hostile[:5]))}"
            )
        self.files: Mapping[str, RemoteFile] = {file.name: file for file in listed}

    def check_access(self, file: RemoteFile) -> None:
        """Request a file's metadata only: anyone may list a gated repository, but not read its files.

        Raises:
            ConversionError: access is denied.
        """
        from huggingface_hub import constants, get_hf_file_metadata

        with self._translated_errors(self.commit):
            get_hf_file_metadata(self._url_of(file), headers=self._headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)

    def read(self, file: RemoteFile) -> bytes:
        """Download a small file to memory. ``fetch`` does not request it again.

        Raises:
            ConversionError: it is large, or the download fails.
        """
        if file.size > _MAX_IN_MEMORY:
            raise ConversionError(f"{self.url}: {file.name} is {file.size:,} bytes, more than any index of tensors")
        if file.key not in self._in_memory:
            stream = io.BytesIO()
            with self._translated_errors(self.commit):
                self._complete(PartialDownload(stream, file), lambda _: None, Event())
            self._in_memory[file.key] = stream.getvalue()
        return self._in_memory[file.key]

    def pieces(self, file: RemoteFile, start: int, stop: int) -> Generator[bytes, None, None]:
        """Download a range of a file's bytes, in pieces, with retries. Close it to stop.

        Raises:
            DownloadError: the last retry failed, or the hub refuses.
        """
        at, idle = start, 0
        with self._translated_errors(self.commit):
            while at < stop:
                before = at
                try:
                    for piece in self._range(file, at, stop):
                        at += len(piece)
                        yield piece
                except self._download_errors() as error:
                    idle = 0 if at > before else idle + 1
                    if _is_final(error) or idle > len(WAITS):
                        raise
                    time.sleep(WAITS[max(idle - 1, 0)])

    def _range(self, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        """Request a range of a file once."""
        from huggingface_hub import constants, get_session, hf_raise_for_status

        headers = {**self._headers, "Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
        with get_session().stream(
            "GET",
            self._url_of(file),
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=True,
        ) as response:
            hf_raise_for_status(response)
            # A server may ignore Range and send the whole file.
            at = start if response.headers.get("Content-Range", "").startswith(f"bytes {start}-") else 0
            for piece in response.iter_bytes():
                wanted = piece[max(start - at, 0) : max(stop - at, 0)]
                at += len(piece)
                if wanted:
                    yield wanted
                if at >= stop:
                    return
        raise _http_library().RemoteProtocolError(f"{file.name} ended after {at:,} of {file.size:,} bytes")

    @staticmethod
    def _download_errors() -> tuple[type[Exception], ...]:
        """Errors of a request, of which some are worth another try."""
        from huggingface_hub.errors import HfHubHTTPError

        return _http_library().TransportError, HfHubHTTPError

    def fetch(
        self, files: Sequence[RemoteFile], folder: Path, count: Callable[[int], None], stop: Event | None = None
    ) -> None:
        """Download files into ``folder``, several at once. Each gets the name ``key`` when it is complete.

        Bytes that are there already, of complete or partial downloads, are not requested again.

        Args:
            files: the files; each content once.
            folder: created if it does not exist.
            count: called from several threads with the bytes of each piece; with a negative number where a server
                starts a file anew.
            stop: ends the downloads early, and without an error, when it is set.

        Raises:
            DownloadError: a download fails, or its hash is wrong. Partial downloads are kept, unless they are wrong.
        """
        stop = Event() if stop is None else stop
        with self._translated_errors(self.commit), ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            waiting = [pool.submit(self._fetch, file, folder, count, stop) for file in files]
            try:
                for future in as_completed(waiting):
                    future.result()
            except BaseException:  # Ctrl-C too: the threads end after their current piece
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _fetch(self, file: RemoteFile, folder: Path, count: Callable[[int], None], stop: Event) -> None:
        if stop.is_set():
            return
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{file.key}{PARTIAL_SUFFIX}"
        if file.key in self._in_memory:
            partial.write_bytes(self._in_memory[file.key])
        try:
            with partial.open("a+b") as stream:
                content = PartialDownload(stream, file)
                count(content.size)
                self._complete(content, count, stop)
        except ConversionError:  # a wrong hash, or too many bytes: nothing of it can be used
            partial.unlink()
            raise
        if content.size == file.size:
            os.replace(partial, folder / file.key)

    def _complete(self, content: PartialDownload, count: Callable[[int], None], stop: Event) -> None:
        """Request the missing bytes, with retries, until there are none or ``stop`` is set.

        Raises:
            ConversionError: the hash is wrong.
            httpx.TransportError, HfHubHTTPError: the last retry failed, or the hub refuses.
        """
        file, idle = content.file, 0
        while content.size < file.size and not stop.is_set():
            before = content.size
            try:
                self._request_rest(content, count, stop)
            except self._download_errors() as error:
                # Any new byte is progress; only attempts in a row without one count.
                idle = 0 if content.size > before else idle + 1
                if _is_final(error) or idle > len(WAITS):
                    raise
                stop.wait(WAITS[max(idle - 1, 0)])
        if content.size == file.size and not content.is_right():
            raise DownloadError(
                f"{self.url}: the content of {file.name} has hash {content.digest()}, expected {file.key} (all "
                f"{file.size:,} bytes arrived). It was damaged on the way and is deleted; download it again"
            )

    def _request_rest(self, content: PartialDownload, count: Callable[[int], None], stop: Event) -> None:
        """Request the rest of a file once. May end early with an error of the transport."""
        from huggingface_hub import constants, get_session, hf_raise_for_status

        httpx = _http_library()
        file, start = content.file, content.size
        # Uncompressed: Range and the size count the bytes of the file itself.
        headers = {**self._headers, "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        # Redirects lead to storage servers; httpx sends the token to no host but the hub.
        with get_session().stream(
            "GET",
            self._url_of(file),
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=True,
        ) as response:
            hf_raise_for_status(response)
            # A server may ignore Range and send the whole file (200): then start anew.
            if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                content.restart()
                count(-start)
                if response.status_code == 206:
                    raise httpx.RemoteProtocolError(f"asked for the bytes from {start:,} on, got others")
            for piece in response.iter_bytes():
                # Without this, a server that never ends would fill the disk.
                if content.size + len(piece) > file.size:
                    raise DownloadError(f"{self.url}: more than the {file.size:,} bytes of {file.name} came")
                content.add(piece)
                count(len(piece))
                if stop.is_set():
                    return
        if content.size < file.size:
            raise httpx.RemoteProtocolError(f"{file.name} ended after {content.size:,} of {file.size:,} bytes")

    def _url_of(self, file: RemoteFile) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, file.name, revision=self.commit)

    @contextlib.contextmanager
    def _translated_errors(self, revision: str) -> Iterator[None]:
        """Turn errors of the hub and the network into ConversionErrors that say what they mean to the user."""
        from huggingface_hub.errors import HfHubHTTPError

        httpx = _http_library()
        try:
            yield
        except HfHubHTTPError as error:
            raise DownloadError(self._refusal(error, revision)) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise DownloadError(
                f"{self.url} cannot be reached ({type(error).__name__}: {error}); check the network, and HTTPS_PROXY "
                "and HF_ENDPOINT if you set them. What has arrived is kept, and the next download resumes from there; "
                "HF_HUB_OFFLINE=1 takes a copy that is whole in the cache"
            ) from error

    def _refusal(self, error: Any, revision: str) -> str:
        """The message for an HTTP error of the hub. 401 and 404 are alike: the hub hides private repositories."""
        from huggingface_hub import errors

        status: int = error.response.status_code
        log_in = "log in with `hf auth login`, or set HF_TOKEN"
        with_token = "authorization" in self._headers
        if isinstance(error, errors.GatedRepoError):
            return f"{self.repo} is gated: accept its licence at {self.url} in a browser, then " + (
                "use the token of that account; the present one has no access (yet)" if with_token else log_in
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{self.url} has no revision {revision!r}; expected one of its branches, tags or commits"
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
            advice = "that your token may read it" if with_token else f"if it is private or gated, {log_in}"
            here = "" if os.path.lexists(self.repo) else f", and {self.repo} is no path here"
            return f"there is no model at {self.url} that you may read ({status}){here}: check the name, and {advice}"
        said = error.server_message or error.response.reason_phrase
        if status == 403:
            return f"{self.url} may not be read (403, {said}); check the rights of your token"
        return f"{self.url}: the hub answers {status} ({said}); try again later, what has arrived is kept"


def _is_final(error: Exception) -> bool:
    """Whether another try is in vain: 408, 429 and 5xx are temporary, every other refusal of the hub is not."""
    status: int = getattr(getattr(error, "response", None), "status_code", 503)
    return status not in (408, 429) and status < 500


def _http_library() -> Any:
    """The library whose errors huggingface_hub lets through."""
    from huggingface_hub import utils

    # Release 2 has it under this name, release 1 is made with httpx.
    return utils.httpx if hasattr(utils, "httpx") else importlib.import_module("httpx")
