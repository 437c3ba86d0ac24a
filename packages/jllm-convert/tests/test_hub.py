"""Downloads from a hub on this machine: what is asked for, what lands where, and what happens when it goes wrong."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
from huggingface_hub import constants
from jllm_convert.errors import ConversionError, DestinationError, DownloadError
from jllm_convert.hub import repository
from jllm_convert.hub.downloading import download, local_path, origin
from jllm_convert.hub.model_id import looks_like_id
from jllm_convert.hub.remote_file import PartialDownload
from jllm_convert.hub.repository import PARTIAL_SUFFIX

from .hub_server import HubServer

ID = "owner/model"
SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
INDEX = "model.safetensors.index.json"
TOKEN = "hf_a-token-of-the-tests"


def noise(seed: str, size: int) -> bytes:
    return hashlib.shake_128(seed.encode()).digest(size)


WEIGHTS = {name: noise(name, 300_000) for name in SHARDS}
NEEDED = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b"{}",  # the same content as another file's
    "special_tokens_map.json": b'{"eos_token": "</s>"}',
    "chat_template.jinja": b"{{ messages }}",
    INDEX: json.dumps({"weight_map": {f"tensor.{n}": SHARDS[n % 3] for n in range(7)}}).encode(),
    **WEIGHTS,
}
NOT_NEEDED = {
    ".gitattributes": b"* text",
    "README.md": b"# A model",
    "merges.txt": b"a b",
    "vocab.json": b"{}\n",
    "model.safetensors": noise("another precision", 1000),
    "model-fp8.safetensors": noise("fp8", 1000),
    "pytorch_model.bin": noise("pickle", 1000),
    "consolidated.00.pth": noise("pth", 1000),
    "model.gguf": noise("gguf", 1000),
    "onnx/model.onnx": noise("onnx", 1000),
    "original/tokenizer.json": b"{} ",
}
SINGLE = {"config.json": b"{}", "model.safetensors": noise("single", 200_000)}


class Cache(NamedTuple):
    home: Path
    folder: Path

    def model(self, name: str = ID) -> Path:
        return self.folder / f"models--{name.replace('/', '--')}"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "home", tmp_path / "home" / "hub")


@pytest.fixture(scope="module", autouse=True)
def one_session() -> Iterator[None]:
    """One session of huggingface_hub for all tests, which reads the certificates once, and closes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        huggingface_hub.close_session()
        yield
        huggingface_hub.close_session()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Cache) -> Iterator[HubServer]:
    """A hub that huggingface_hub takes for its own, with a cache and without a token."""
    with HubServer() as server:
        use(monkeypatch, server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache.folder))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache.home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(repository, "WAITS", (0.0, 0.0))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield server


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """What HF_ENDPOINT does when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def commit(hub: HubServer) -> str:
    """A model in shards, with much else in its repository."""
    return hub.add(ID, {**NEEDED, **NOT_NEEDED})


@pytest.fixture(params=["cache", "folder"])
def dest(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "dest" if request.param == "folder" else None


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by their names."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def blobs(cache: Cache, dest: Path | None) -> dict[str, bytes]:
    """The contents that a download has brought so far, whole or in part."""
    return contents(cache.model() / "blobs" if dest is None else dest / ".jllm-download")


def downloaded(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if name != "jllm-download.json"}


def error_of(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ConversionError) as caught:
        download(*arguments, **options)
    return str(caught.value)


# ---- What is asked for, and where it lands


def test_only_what_a_conversion_reads_is_asked_for(hub: HubServer, commit: str, cache: Cache) -> None:
    folder = download(ID)
    assert folder == cache.model() / "snapshots" / commit
    assert contents(folder) == NEEDED
    once = sorted(NEEDED.keys() - {"generation_config.json"})
    assert hub.asked("GET") == once  # two files of one content are one request
    listing = [request for request in hub.requests if request.path.startswith("/api/")]
    assert [request.path for request in listing] == [f"/api/models/{ID}/revision/main"]
    assert len(hub.requests) == 1 + len(once) + 1  # and one that asks whether the files may be read
    assert all(hub.sent(name) == len(NEEDED[name]) for name in once)


def test_the_cache_is_as_huggingface_hub_has_it(hub: HubServer, commit: str, cache: Cache) -> None:
    download(ID)
    for name, content in NEEDED.items():
        path = huggingface_hub.hf_hub_download(ID, name, local_files_only=True)
        assert Path(path).read_bytes() == content
        assert os.path.islink(path)
        assert not os.path.isabs(os.readlink(path))
    (repo,) = huggingface_hub.scan_cache_dir(cache.folder).repos
    (revision,) = repo.revisions
    assert (repo.repo_id, revision.commit_hash, revision.refs) == (ID, commit, {"main"})
    assert not list(cache.folder.rglob("*.incomplete"))


def test_what_huggingface_hub_has_brought_is_used(hub: HubServer, commit: str, cache: Cache) -> None:
    for name in (*SHARDS, "config.json"):
        huggingface_hub.hf_hub_download(ID, name)
    hub.requests.clear()
    assert contents(download(ID)) == NEEDED
    assert not {*SHARDS, "config.json"} & set(hub.asked())


def test_a_second_download_asks_for_no_file(hub: HubServer, commit: str, dest: Path | None) -> None:
    first = download(ID, dest)
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    hub.requests.clear()
    assert download(ID, dest) == first
    assert (hub.asked(), len(hub.requests)) == ([], 1)
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before


def test_a_folder_gets_plain_files_and_a_record(hub: HubServer, commit: str, tmp_path: Path, cache: Cache) -> None:
    dest = tmp_path / "models" / "mine"
    assert download(ID, dest) == dest
    assert downloaded(dest) == NEEDED
    assert not any(path.is_symlink() for path in dest.rglob("*"))
    record = json.loads((dest / "jllm-download.json").read_text())
    assert (record["repo"], record["revision"]) == (ID, commit)
    assert record["files"] == {
        name: {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest() if name.endswith(".safetensors") else None,
        }
        for name, content in NEEDED.items()
    }
    assert sorted(path.name for path in dest.iterdir()) == sorted([*NEEDED, "jllm-download.json"])
    assert not cache.folder.exists()


def test_weights_in_one_file(hub: HubServer, dest: Path | None) -> None:
    hub.add(ID, {**SINGLE, "model.gguf": b"gguf"})
    assert downloaded(download(ID, str(dest) if dest else None)) == SINGLE
    assert hub.asked("GET") == sorted(SINGLE)


def test_an_empty_file_is_a_file(hub: HubServer, dest: Path | None) -> None:
    hub.add(ID, {**SINGLE, "chat_template.jinja": b""})
    assert downloaded(download(ID, dest)) == {**SINGLE, "chat_template.jinja": b""}


def test_named_chat_templates_are_downloaded(hub: HubServer, dest: Path | None) -> None:
    named = {f"additional_chat_templates/{name}.jinja": name.encode() for name in ("tool_use", "rag")}
    others = {
        "additional_chat_templates/README.md": b"r",
        "additional_chat_templates/old/a.jinja": b"a",
        "other/b.jinja": b"b",
    }
    hub.add(ID, {**SINGLE, **named, **others})
    assert downloaded(download(ID, dest)) == {**SINGLE, **named}


@pytest.mark.parametrize("name", ["tiny-Q4_K_M.gguf", "quantised/small.GGUF"])
def test_a_gguf_file_by_its_name(hub: HubServer, dest: Path | None, cache: Cache, name: str) -> None:
    commit = hub.add(ID, {**SINGLE, name: noise(name, 50_000), "other.gguf": b"other"})
    path = download(f"{ID}/{name}", dest)
    assert path == (dest or cache.model() / "snapshots" / commit) / name
    assert path.read_bytes() == noise(name, 50_000)
    assert hub.asked("GET") == [name]
    assert origin(path) == {"repo": ID, "revision": commit}


def test_gguf_files_gather_in_a_folder(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add(ID, {"a.gguf": b"a", "b.gguf": b"b"})
    for name in ("a.gguf", "b.gguf"):
        download(f"{ID}/{name}", tmp_path / "dest")
    assert downloaded(tmp_path / "dest") == {"a.gguf": b"a", "b.gguf": b"b"}
    assert origin(tmp_path / "dest") == origin(tmp_path / "dest" / "a.gguf") == {"repo": ID, "revision": commit}


def test_no_output_and_no_change_of_the_environment(
    hub: HubServer, commit: str, dest: Path | None, capfd: pytest.CaptureFixture[str]
) -> None:
    before = dict(os.environ)
    download(ID, dest)
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == before


def test_importing_it_costs_nothing() -> None:
    heavy = {"huggingface_hub", "httpx2", "numpy", "jax"}
    code = f"import sys, jllm_convert.hub.downloading\nprint(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# ---- Revisions


def test_all_files_are_of_the_commit_that_was_listed(hub: HubServer, commit: str, dest: Path | None) -> None:
    hub.after_listing = lambda: hub.repos[ID].commit(dict.fromkeys(NEEDED, b"new")) and None
    folder = download(ID, dest)
    assert downloaded(folder) == NEEDED
    assert origin(folder) == {"repo": ID, "revision": commit}
    assert {request.path.split("/")[4] for request in hub.requests if request.file} == {commit}


def test_a_branch_that_moved_is_followed(hub: HubServer, commit: str, dest: Path | None) -> None:
    old = download(ID, dest)
    changed = {**NEEDED, SHARDS[1]: noise("trained longer", 300_000), "config.json": b'{"model_type": "qwen3"}'}
    moved = hub.repos[ID].commit(changed)
    hub.requests.clear()
    folder = download(ID, dest)
    assert downloaded(folder) == changed
    assert origin(folder) == {"repo": ID, "revision": moved}
    assert hub.asked("GET") == sorted(["config.json", SHARDS[1]])
    if dest is None:
        assert contents(old) == NEEDED
        assert origin(old) == {"repo": ID, "revision": commit}
        assert contents(download(ID, revision=commit)) == NEEDED


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/1", None])
def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: HubServer, cache: Cache, revision: str | None) -> None:
    asked = hub.add(ID, SINGLE)
    hub.repos[ID].branches |= {revision: asked} if revision else {}
    hub.repos[ID].commit({**SINGLE, "config.json": b"[]"})
    assert contents(download(ID, revision=revision or asked)) == SINGLE
    references = contents(cache.model() / "refs") if revision else {}
    assert references == ({revision: asked.encode()} if revision else {})


@pytest.mark.parametrize("revision", ["", "../../outside", "/etc", "a\\..\\..\\b"])
def test_what_is_no_revision_is_not_asked_for(hub: HubServer, commit: str, revision: str) -> None:
    assert "is not a revision; expected a branch, a tag or a commit" in error_of(ID, revision=revision)
    assert hub.requests == []


# ---- Interruptions


def test_a_connection_that_breaks_is_taken_up_again(hub: HubServer, commit: str, dest: Path | None) -> None:
    hub.cut_after = {SHARDS[0]: [100_000, 50_000], SHARDS[2]: [0]}
    assert downloaded(download(ID, dest)) == NEEDED
    parts = [request for request in hub.requests if request.file == SHARDS[0] and request.method == "GET"]
    assert [request.headers.get("range") for request in parts] == [None, "bytes=100000-", "bytes=150000-"]
    assert hub.sent(SHARDS[0]) == hub.sent(SHARDS[2]) == 300_000


def test_a_connection_may_break_as_often_as_it_brings_something(hub: HubServer, commit: str) -> None:
    hub.cut_after = {SHARDS[0]: 20_000}
    assert contents(download(ID)) == NEEDED
    assert hub.sent(SHARDS[0]) == 300_000


def test_a_hub_that_breaks_off_for_good_is_an_error_and_the_next_download_goes_on(
    hub: HubServer, commit: str, dest: Path | None, cache: Cache
) -> None:
    hub.cut_after = {SHARDS[1]: [120_000, 0, 0, 0]}
    message = error_of(ID, dest)
    assert f"{hub.url}/{ID} cannot be reached" in message
    assert "the next download resumes from there" in message
    assert dest is None or downloaded(dest).keys().isdisjoint(NEEDED)
    # A new process has nothing in memory: all that counts is on disk.
    here = blobs(cache, dest).values()
    whole = {name for name, content in NEEDED.items() if content in here} - {INDEX}
    assert len(whole) >= 5
    hub.requests.clear()
    reports: list[tuple[int, int]] = []
    assert downloaded(download(ID, dest, on_progress=lambda *report: reports.append(report))) == NEEDED
    assert not whole & set(hub.asked("GET"))
    assert hub.sent(SHARDS[1]) == 180_000
    assert reports[0][0] > 0
    assert reports[-1][0] == reports[-1][1]


CHILD = (
    "import sys\nfrom jllm_convert.hub.downloading import download\nprint(download(sys.argv[1], sys.argv[2] or None))"
)


def start(hub: HubServer, cache: Cache, dest: Path | None, **variables: str) -> "subprocess.Popen[str]":
    """The download in a process of its own, which finds the hub and the cache as a user's does."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache.home), "HF_HUB_DISABLE_TELEMETRY": "1", **variables}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, ID, str(dest or "")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_stopped_leaves_what_it_has_to_the_next(
    hub: HubServer, commit: str, cache: Cache, dest: Path | None, stop: signal.Signals
) -> None:
    hub.hold_after = {SHARDS[2]: 200_000}
    with start(hub, cache, dest, HF_HUB_DOWNLOAD_TIMEOUT="1") as process:
        try:
            place = (dest or cache.folder).parent
            wait_for(lambda: [p for p in place.rglob("*.incomplete") if p.stat().st_size == 200_000] != [])
            wait_for(lambda: all(hub.sent(name) for name in SHARDS))
            wait_for(lambda: len(list(place.rglob("*.incomplete"))) == 1)
            process.send_signal(stop)
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == -stop
    assert ("KeyboardInterrupt" in err) == (stop == signal.SIGINT)
    assert dest is None or downloaded(dest).keys().isdisjoint(NEEDED)
    hub.release()
    hub.requests.clear()
    assert downloaded(download(ID, dest)) == NEEDED
    assert hub.asked("GET") == [SHARDS[2]]
    assert hub.sent(SHARDS[2]) == 100_000


def wait_for(condition: Callable[[], bool]) -> None:
    end, met = time.monotonic() + 20, False
    while not met:
        assert time.monotonic() < end
        time.sleep(0.02)
        with contextlib.suppress(FileNotFoundError):  # a file that goes while it is looked at
            met = condition()


def test_a_server_that_cannot_send_parts_starts_anew(hub: HubServer, commit: str, dest: Path | None) -> None:
    hub.ranges = False
    hub.cut_after = {SHARDS[0]: [150_000]}
    reports: list[int] = []
    assert downloaded(download(ID, dest, on_progress=lambda here, _: reports.append(here))) == NEEDED
    assert hub.sent(SHARDS[0]) == 450_000
    assert reports == sorted(set(reports))


def test_a_passing_refusal_is_asked_again(hub: HubServer, commit: str) -> None:
    path = f"/{ID}/resolve/{commit}/{SHARDS[0]}"
    hub.answers[path] = [(503, {}, b"busy"), (429, {}, b"slower")]
    assert contents(download(ID)) == NEEDED
    assert len([r for r in hub.requests if r.path == path]) == 3


def test_a_callback_can_end_a_download(hub: HubServer, commit: str, dest: Path | None) -> None:
    def stop(here: int, total: int) -> None:
        if here > 400_000:
            raise KeyboardInterrupt

    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        download(ID, dest, on_progress=stop)
    wait_for(lambda: threading.active_count() <= threads)
    assert downloaded(download(ID, dest)) == NEEDED
    assert sum(hub.sent(name) for name in NEEDED) < 1.5 * sum(map(len, NEEDED.values()))


def test_progress_is_in_bytes_and_never_goes_back(hub: HubServer, commit: str, dest: Path | None) -> None:
    reports: list[tuple[int, int]] = []
    download(ID, dest, on_progress=lambda *report: reports.append(report))
    total = sum(map(len, NEEDED.values())) - len(b"{}")
    assert {each for _, each in reports} == {total}
    here = [each for each, _ in reports]
    assert (here[0], here[-1]) == (0, total)
    assert here == sorted(set(here))
    assert len(here) > 10
    reports.clear()
    download(ID, dest, on_progress=lambda *report: reports.append(report))
    assert reports == [(total, total)]


def test_two_downloads_at_once_share_the_work(hub: HubServer, commit: str, dest: Path | None) -> None:
    hub.hold_after = {SHARDS[0]: 1000}
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(download(ID, dest))) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_for(lambda: hub.sent(SHARDS[0]) == 1000 and len(hub.asked("HEAD")) == 2)
    hub.release()
    for thread in threads:
        thread.join()
    assert downloaded(results[0]) == downloaded(results[1]) == NEEDED
    assert all(hub.sent(name) == 300_000 for name in SHARDS)
    assert origin(results[0]) == {"repo": ID, "revision": commit}
    assert dest is None or not list(dest.glob(".*"))


def test_what_another_download_finishes_meanwhile_is_no_error(
    hub: HubServer, commit: str, dest: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: path.name.endswith(PARTIAL_SUFFIX) or is_file(path))
    assert downloaded(download(ID, dest)) == NEEDED


def test_two_downloads_into_one_folder_are_both_on_record(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add(ID, {"a.gguf": noise("a", 1000), "b.gguf": noise("b", 1000)})
    hub.hold_after = {"a.gguf": 10, "b.gguf": 10}
    threads = [threading.Thread(target=download, args=(f"{ID}/{name}.gguf", tmp_path)) for name in "ab"]
    for thread in threads:
        thread.start()
    wait_for(lambda: hub.sent("a.gguf") + hub.sent("b.gguf") == 10 and len(hub.asked("HEAD")) == 2)
    hub.release()
    for thread in threads:
        thread.join()
    assert origin(tmp_path / "a.gguf") == origin(tmp_path / "b.gguf") == {"repo": ID, "revision": commit}


# ---- Contents that are wrong


@pytest.mark.parametrize("name", [SHARDS[1], "tokenizer.json"])
def test_a_content_of_another_hash_is_deleted(hub: HubServer, commit: str, dest: Path | None, name: str) -> None:
    content = NEEDED[name]
    hub.served = {name: bytes([content[0] ^ 1]) + content[1:]}
    message = error_of(ID, dest)
    assert f"the content of {name} has hash" in message
    assert "expected " in message
    assert "download it again" in message
    assert dest is None or downloaded(dest).keys().isdisjoint(NEEDED)
    hub.served = {}
    hub.requests.clear()
    assert downloaded(download(ID, dest)) == NEEDED
    assert hub.sent(name) == len(content)


def test_a_damaged_beginning_is_found_when_the_rest_arrives(hub: HubServer, commit: str, cache: Cache) -> None:
    hub.cut_after = {SHARDS[0]: [100_000, 0, 0, 0]}
    error_of(ID)
    # Another file may have been under way as well.
    key = hashlib.sha256(NEEDED[SHARDS[0]]).hexdigest()
    (partial,) = cache.model().glob(f"blobs/{key}*.incomplete")
    assert partial.read_bytes() == NEEDED[SHARDS[0]][:100_000]
    partial.write_bytes(b"x" * 100_000)
    assert f"the content of {SHARDS[0]} has hash" in error_of(ID)
    assert contents(download(ID)) == NEEDED


def test_more_bytes_than_announced_are_not_taken(hub: HubServer, commit: str, dest: Path | None) -> None:
    hub.served = {SHARDS[0]: NEEDED[SHARDS[0]] + b"more"}
    assert f"more than the 300,000 bytes of {SHARDS[0]} came" in error_of(ID, dest)


def test_fewer_bytes_than_announced_are_an_error(hub: HubServer, commit: str, dest: Path | None) -> None:
    hub.served = {SHARDS[0]: NEEDED[SHARDS[0]][:-1]}
    assert f"{SHARDS[0]} ended after 299,999 of 300,000 bytes" in error_of(ID, dest)


# ---- Offline


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("asked", ["main", "commit", "gguf"])
def test_offline_a_whole_copy_is_used(
    hub: HubServer, commit: str, dest: Path | None, offline: Callable[[], None], asked: str
) -> None:
    name = f"{ID}/model.gguf" if asked == "gguf" else ID
    revision = commit if asked == "commit" else None
    path = download(name, dest, revision)
    hub.requests.clear()
    offline()
    assert download(name, dest, revision) == path
    assert hub.requests == []


@pytest.mark.parametrize("missing", ["all", "config.json", SHARDS[1], INDEX])
def test_offline_half_a_copy_is_an_error(
    hub: HubServer, commit: str, dest: Path | None, offline: Callable[[], None], missing: str
) -> None:
    if missing != "all":
        (download(ID, dest) / missing).unlink()
        hub.requests.clear()
    offline()
    message = error_of(ID, dest)
    assert "offline (HF_HUB_OFFLINE)" in message
    assert f"has no complete copy of {ID} at main; unset HF_HUB_OFFLINE to download it" in message
    assert hub.requests == []


def test_offline_a_folder_of_another_model_or_revision_is_no_copy(
    hub: HubServer, commit: str, tmp_path: Path, offline: Callable[[], None]
) -> None:
    download(ID, tmp_path / "dest")
    offline()
    assert "no complete copy of owner/other" in error_of("owner/other", tmp_path / "dest")
    assert "no complete copy" in error_of(ID, tmp_path / "dest", "0" * 40)
    assert "no complete copy" in error_of(f"{ID}/model.gguf", tmp_path / "dest")


def test_offline_by_the_variable(hub: HubServer, commit: str, cache: Cache) -> None:
    with start(hub, cache, None, HF_HUB_OFFLINE="1") as process:
        assert "ConversionError: offline (HF_HUB_OFFLINE)" in process.communicate(timeout=20)[1]
    assert hub.requests == []
    folder = download(ID)
    hub.requests.clear()
    with start(hub, cache, None, HF_HUB_OFFLINE="1") as process:
        assert process.communicate(timeout=20) == (f"{folder}\n", "")
    assert hub.requests == []


# ---- Refusals


def test_a_gated_model_says_how_to_be_let_in(
    hub: HubServer, commit: str, cache: Cache, dest: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[ID].gated = True
    hub.tokens = {TOKEN}
    licence = f"{ID} is gated: accept its licence at {hub.url}/{ID} in a browser, then "
    assert error_of(ID, dest) == licence + "log in with `hf auth login`, or set HF_TOKEN"
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    message = error_of(ID, dest)
    assert message == licence + "use the token of that account; the present one has no access (yet)"
    assert not cache.folder.exists()
    assert dest is None or not dest.exists()
    cache.home.mkdir()
    (cache.home / "token").write_text(TOKEN)  # as `hf auth login` leaves it
    monkeypatch.delenv("HF_TOKEN")
    assert downloaded(download(ID, dest)) == NEEDED


@pytest.mark.parametrize("token", [None, "hf_another"])
def test_a_model_that_is_not_there_or_not_public(hub: HubServer, monkeypatch: Any, token: str | None) -> None:
    hub.add("owner/private", SINGLE)
    hub.repos["owner/private"].private = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    for name in ("owner/private", "owner/nothing"):
        message = error_of(name)
        expected = f"there is no model at {hub.url}/{name} that you may read (401), and {name} is no path here: check"
        assert expected in message
        assert ("your token" in message) == (token is not None)
        assert ("`hf auth login`" in message) == (token is None)
    hub.tokens = {"hf_another"}
    if token:
        assert "(404)" in error_of("owner/nothing")


def test_a_revision_that_is_not_there(hub: HubServer, commit: str) -> None:
    expected = f"{hub.url}/{ID} has no revision 'v9'; expected one of its branches, tags or commits"
    assert error_of(ID, revision="v9") == expected


@pytest.mark.parametrize("status", [403, 429, 500])
@pytest.mark.parametrize("where", ["listing", "file"])
def test_other_refusals_are_told_with_their_status(hub: HubServer, commit: str, status: int, where: str) -> None:
    path = f"/api/models/{ID}/revision/main" if where == "listing" else f"/{ID}/resolve/{commit}/{SHARDS[0]}"
    hub.answers[path] = (status, {"X-Error-Message": "not today"}, b"")
    message = error_of(ID)
    assert hub.url in message
    assert str(status) in message
    assert "not today" in message


def test_a_hub_that_cannot_be_reached(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        use(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}")
        message = error_of(ID, tmp_path / "dest")
    assert "cannot be reached (ConnectError" in message
    with pytest.raises(
        DownloadError, match="there is nothing at owner/model on this machine, and as a model of the hub"
    ):
        local_path(ID)  # another try may succeed, as the exit code says
    for advice in ("check the network", "HTTPS_PROXY", "HF_ENDPOINT", "HF_HUB_OFFLINE=1"):
        assert advice in message
    assert not (tmp_path / "dest").exists()
    use(monkeypatch, "nonsense")
    assert "nonsense/owner/model cannot be reached" in error_of(ID)


@pytest.mark.parametrize("answer", [b"<html>Log in to the wifi</html>", b"[]", b'{"id": "x", "siblings": [{}]}'])
def test_an_answer_that_is_no_hubs(hub: HubServer, commit: str, answer: bytes) -> None:
    hub.answers[f"/api/models/{ID}/revision/main"] = (200, {}, answer)
    message = error_of(ID)
    assert f"{hub.url} does not answer as a Hugging Face hub does about {ID}" in message
    assert "Check HF_ENDPOINT" in message


def test_the_token_goes_to_the_hub_alone_and_into_no_log(
    hub: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dest: Path | None
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    with HubServer() as elsewhere:
        elsewhere.repos = hub.repos
        elsewhere.cut_after = {SHARDS[0]: [1000]}
        hub.elsewhere = elsewhere.url.replace("127.0.0.1", "localhost")
        folder = download(ID, dest)
        assert downloaded(folder) == NEEDED
        assert elsewhere.asked("GET") == sorted([*SHARDS, SHARDS[0]])
        assert not any("authorization" in request.headers for request in elsewhere.requests)
        assert TOKEN not in repr(elsewhere.requests)
    assert {request.headers.get("authorization") for request in hub.requests} == {f"Bearer {TOKEN}"}
    hub.answers[f"/api/models/{ID}/revision/main"] = (500, {}, b"")
    assert TOKEN not in error_of(ID) + caplog.text
    assert not any(TOKEN.encode() in content for content in contents(folder).values())


# ---- What a repository has instead of a model


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"pytorch_model.bin": b""}, "pytorch_model.bin, which can run any code when loaded and so are not taken"),
        ({"a.gguf": b"", "q/b.gguf": b""}, f"download one by its own name: {ID}/a.gguf, {ID}/q/b.gguf"),
        ({"a.gguf": b"", "pytorch_model.bin": b""}, f"download one by its own name: {ID}/a.gguf"),
        ({"adapter_model.safetensors": b""}, "It has adapter_model.safetensors, config.json; expected a model of its"),
        ({f"{n:02}.txt": b"" for n in range(20)}, "09.txt and 11 more; expected a model of its own, in safetensors"),
    ],
)
def test_a_repository_without_safetensors(
    hub: HubServer, tmp_path: Path, files: dict[str, bytes], expected: str
) -> None:
    hub.add(ID, {"config.json": b"{}", **files})
    message = error_of(ID, tmp_path / "dest")
    assert f"has no model.safetensors and no {INDEX}" in message
    assert expected in message
    assert hub.asked() == []
    assert not (tmp_path / "dest").exists()


def test_a_repository_that_lacks_files(hub: HubServer, cache: Cache) -> None:
    hub.add(ID, {INDEX: NEEDED[INDEX], SHARDS[0]: b"", SHARDS[2]: b""})
    message = error_of(ID)
    assert f"lacks config.json, {SHARDS[1]}, without which its model cannot be read" in message
    assert not cache.folder.exists()


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (b"{", f"{INDEX} Expecting property name"),
        (b"\xff", f"{INDEX} 'utf-8' codec"),
        (b"[]", f"{INDEX} has no weight_map of tensors to files"),
        (b'{"weight_map": {"a": 1}}', f"{INDEX} has no weight_map of tensors to files"),
        (b'{"weight_map": {}}', f"{INDEX} puts tensors in no file"),
        (b'{"weight_map": {"a": "pytorch_model.bin"}}', f"{INDEX} puts tensors in 'pytorch_model.bin'"),
    ],
)
def test_an_index_that_is_none(hub: HubServer, cache: Cache, index: bytes, expected: str) -> None:
    hub.add(ID, {**SINGLE, INDEX: index, "pytorch_model.bin": b""})
    assert expected in error_of(ID)
    assert not cache.folder.exists()


def test_an_index_beyond_reason_is_not_read(hub: HubServer, monkeypatch: pytest.MonkeyPatch, commit: str) -> None:
    monkeypatch.setattr(repository, "_MAX_IN_MEMORY", 10)
    assert f"{INDEX} is {len(NEEDED[INDEX])} bytes, more than any index" in error_of(ID)
    assert hub.asked() == []


def test_a_gguf_file_that_is_not_there_or_is_a_part(hub: HubServer) -> None:
    hub.add(ID, {"a.gguf": b"", "big-00001-of-00003.gguf": b""})
    assert "has no b.gguf at " in error_of(f"{ID}/b.gguf")
    assert "it has a.gguf, big-00001-of-00003.gguf" in error_of(f"{ID}/b.gguf")
    message = error_of(f"{ID}/big-00001-of-00003.gguf")
    assert "is one of 3 parts" in message
    assert "llama-gguf-split --merge" in message


# ---- What a stranger's names may not do


HOSTILE = ["../outside", "a/../../outside", "/outside", "C:outside", "..\\outside", "\\\\host\\share", "a\0b"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_repository_with_a_hostile_name_is_refused_whole(
    hub: HubServer, commit: str, tmp_path: Path, dest: Path | None, name: str
) -> None:
    hub.edit_listing = lambda listing: listing["siblings"].append({**listing["siblings"][0], "rfilename": name})
    before = contents(tmp_path)
    message = error_of(ID, dest)
    assert "names files that would be written outside their folder" in message
    assert repr(name) in message
    assert (contents(tmp_path), hub.asked()) == (before, [])


@pytest.mark.parametrize("name", [*HOSTILE, "sub/model.safetensors", "..", "config.json"])
def test_an_index_with_a_hostile_name_is_refused(hub: HubServer, tmp_path: Path, dest: Path | None, name: str) -> None:
    hub.add(ID, {**SINGLE, INDEX: json.dumps({"weight_map": {"a": "model.safetensors", "b": name}}).encode()})
    before = contents(tmp_path)
    assert f"{INDEX} puts tensors in {name!r}" in error_of(ID, dest)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("field", ["blobId", "sha256", "size", "sha"])
@pytest.mark.parametrize("value", ["../../outside", "0" * 39, None, -1])
def test_a_hash_that_is_none_is_refused(hub: HubServer, commit: str, tmp_path: Path, field: str, value: object) -> None:
    def edit(listing: dict[str, Any]) -> None:
        small, large = (next(e for e in listing["siblings"] if e["rfilename"] == n) for n in ("config.json", SHARDS[0]))
        {"blobId": small, "sha256": large["lfs"], "size": small, "sha": listing}[field][field] = value

    hub.edit_listing = edit
    message = error_of(ID, tmp_path / "dest")
    assert "does not answer as a Hugging Face hub does" in message or "should be a commit" in message
    assert not (tmp_path / "dest").exists()


def test_another_commit_than_the_one_asked_for_is_refused(hub: HubServer, commit: str) -> None:
    hub.edit_listing = lambda listing: listing.update(sha="1" * 40)
    assert f"revision '{commit}' should be a commit, the hub answers '{'1' * 40}'" in error_of(ID, revision=commit)


# ---- The disk


def test_a_full_disk_is_found_before_the_start(
    hub: HubServer, commit: str, dest: Path | None, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = sum(map(len, NEEDED.values())) - len(b"{}")
    free = [need - 1]
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    with pytest.raises(DestinationError) as caught:
        download(ID, dest)
    message = str(caught.value)
    assert f"the download needs {need:,} more bytes, and " in message
    assert f" has {need - 1:,} free; free 1 more, or choose another place" in message
    assert not cache.folder.exists()
    assert dest is None or not dest.exists()

    hub.cut_after = {SHARDS[1]: [120_000, 0, 0, 0]}
    free[0] = need
    error_of(ID, dest)
    # Another file than the one that broke off may be here in part, too.
    free[0] = need - sum(map(len, blobs(cache, dest).values())) - 1
    assert "free 1 more" in error_of(ID, dest)
    free[0] += 1
    assert downloaded(download(ID, dest)) == NEEDED


def test_a_disk_that_fills_up_is_an_error_and_the_next_download_goes_on(
    hub: HubServer, commit: str, dest: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = PartialDownload.add

    def fill(self: PartialDownload, piece: bytes) -> None:
        if self.file.name == SHARDS[2]:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, piece)

    monkeypatch.setattr(PartialDownload, "add", fill)
    message = error_of(ID, dest)
    assert "No space left on device" in message
    assert "free some space, or " in message
    monkeypatch.setattr(PartialDownload, "add", add)
    assert downloaded(download(ID, dest)) == NEEDED


def test_a_folder_that_cannot_be_written(hub: HubServer, commit: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = error_of(ID, tmp_path / "file" / "dest")
    assert f"{tmp_path / 'file' / 'dest'} cannot be used (" in message
    assert "see that it can be written, or give another one" in message


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME"])
def test_a_hub_cache_that_cannot_be_used_is_one_sentence(
    hub: HubServer, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    (tmp_path / "file").write_text("")
    from huggingface_hub import constants

    name = "HF_HUB_CACHE" if variable == "HF_HUB_CACHE" else "HF_TOKEN_PATH"
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, name, str(tmp_path / "file" / "x"))
    message = error_of(ID)
    assert "Not a directory" in message
    assert f"set {variable} to " in message
    assert "\n" not in message


def test_a_link_of_the_cache_is_replaced_in_one_step(
    hub: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program, which does not know our lock, may install the same file at the same time."""
    folder, symlink_to = download(ID), Path.symlink_to
    (folder / "config.json").unlink()

    def meet(link: Path, target: str) -> None:
        if not os.path.lexists(folder / "config.json"):
            symlink_to(folder / "config.json", target)
        symlink_to(link, target)

    monkeypatch.setattr(Path, "symlink_to", meet)
    assert downloaded(download(ID)) == NEEDED
    assert (folder / "config.json").is_symlink()


# ---- A folder that has something in it


def test_files_of_the_user_are_not_replaced(hub: HubServer, commit: str, tmp_path: Path) -> None:
    mine = {"config.json": b"mine", SHARDS[0]: b"mine", "notes.txt": b"notes"}
    for name, content in mine.items():
        (tmp_path / name).write_bytes(content)
    message = error_of(ID, tmp_path)
    assert "2 problems" in message
    for name in ("config.json", SHARDS[0]):
        assert f"{tmp_path / name} is there and is not the file of {ID}; it is not replaced" in message
    assert contents(tmp_path) == mine


def test_the_same_files_from_elsewhere_are_kept(hub: HubServer, commit: str, tmp_path: Path) -> None:
    for name in ("config.json", SHARDS[0]):
        (tmp_path / name).write_bytes(NEEDED[name])
    (tmp_path / "notes.txt").write_bytes(b"notes")
    download(ID, tmp_path)
    assert downloaded(tmp_path) == {**NEEDED, "notes.txt": b"notes"}
    assert not {"config.json", SHARDS[0]} & set(hub.asked("GET"))


def test_a_downloaded_file_that_changed_is_brought_back(hub: HubServer, commit: str, tmp_path: Path) -> None:
    download(ID, tmp_path)
    (tmp_path / "config.json").write_bytes(b"edited")
    (tmp_path / SHARDS[0]).unlink()
    assert origin(tmp_path) is None
    hub.requests.clear()
    download(ID, tmp_path)
    assert downloaded(tmp_path) == NEEDED
    assert hub.asked("GET") == sorted(["config.json", SHARDS[0]])
    assert origin(tmp_path) == {"repo": ID, "revision": commit}


def test_two_models_are_not_mixed(hub: HubServer, commit: str, tmp_path: Path) -> None:
    hub.add("owner/other", SINGLE)
    download(ID, tmp_path)
    assert f"{tmp_path} holds files of {ID}; choose another folder" in error_of("owner/other", tmp_path)
    moved = hub.repos[ID].commit({name: content for name, content in NEEDED.items() if name != "chat_template.jinja"})
    message = error_of(ID, tmp_path)
    assert f"{tmp_path} holds chat_template.jinja of revision {commit}, which would be mixed with" in message
    assert moved in message
    assert downloaded(tmp_path) == NEEDED


def test_a_download_that_dies_while_files_change_names_leaves_no_false_record(
    hub: HubServer, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download(ID, tmp_path)
    # Of the same sizes, so that only the record can tell the commits apart.
    changed = {name: content if name == INDEX else content[::-1] for name, content in NEEDED.items()}
    moved = hub.repos[ID].commit(changed)
    replace = os.replace

    def die(source: Path, target: Path) -> None:
        if Path(target).name == SHARDS[0]:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    assert "Input/output error" in error_of(ID, tmp_path)
    assert origin(tmp_path) is None
    monkeypatch.setattr(os, "replace", replace)
    hub.requests.clear()
    download(ID, tmp_path)
    assert hub.asked("GET") == []
    assert origin(tmp_path) == {"repo": ID, "revision": moved}
    assert downloaded(tmp_path) == changed


def test_a_folder_must_be_one(hub: HubServer, commit: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'} is a file; give the name of a folder" in error_of(ID, tmp_path / "file")


# ---- Names and origins

NAMES = ["Qwen/Qwen3-0.6B", "a/b", "unsloth/Llama-3.2-1B.v2", "o/n/model-Q8_0.gguf", "o/n/deep/er/M.GGUF"]
NO_NAMES = [
    *("", "model", "a/", "/b", "/a/b", "./a/b", "../a/b", "~/a/b", "a b/c", "a/b--c", "a/b..c", "a/b.git", "é/b"),
    *(
        "models/mine.gguf",
        "a/b/c",
        "a/b/",
        "a/b/c.safetensors",
        "a/b/../c.gguf",
        "a/b//c.gguf",
        "a/b/.gguf/",
        "x" * 300,
    ),
    *("https://huggingface.co/a/b", "a/b@main", "C:\\models\\a", "a\0/b"),
]


@pytest.mark.parametrize("text", NAMES)
def test_names_of_models(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert looks_like_id(text)
    Path(text).parent.mkdir(parents=True)
    Path(text).write_text("")
    assert not looks_like_id(text)


@pytest.mark.parametrize("text", NO_NAMES)
def test_what_is_no_name_of_a_model(text: str, hub: HubServer) -> None:
    assert not looks_like_id(text)
    message = error_of(text)
    assert f"{text!r} is not a model id of the hub: " in message
    assert "expected owner/name, or owner/name/file.gguf" in message
    assert hub.requests == []


def test_the_origin_of_a_snapshot(cache: Cache) -> None:
    snapshot = cache.model() / "snapshots" / ("ab" * 20)
    expected = {"repo": ID, "revision": "ab" * 20}
    assert origin(snapshot) == origin(snapshot / "deep" / "model.gguf") == expected
    assert origin(Path(os.path.relpath(snapshot))) == expected
    assert origin(snapshot.with_name("main")) is None
    assert origin(cache.folder / "snapshots" / ("ab" * 20)) is None


@pytest.mark.parametrize(
    "record",
    [
        "not json",
        "[]",
        "{}",
        '{"repo": "a/b", "revision": "main", "files": {"config.json": {"size": 2, "sha256": null}}}',
        '{"repo": "a/b", "revision": "SHA", "files": {"config.json": {"size": 3, "sha256": null}}}',
        '{"repo": "a/b", "revision": "SHA", "files": {"../config.json": {"size": 2, "sha256": null}}}',
        '{"repo": "a/b", "revision": "SHA", "files": {"config.json": 2}}',
        '{"repo": "a/b", "revision": "SHA", "files": {}}',
        '{"repo": 1, "revision": "SHA", "files": {"config.json": {"size": 2, "sha256": null}}}',
    ],
)
def test_a_record_that_is_not_to_be_believed(tmp_path: Path, record: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "jllm-download.json").write_text(record.replace("SHA", "0" * 40))
    assert origin(tmp_path) is None
    assert origin(tmp_path / "config.json") is None
    good = '{"repo": "a/b", "revision": "SHA", "files": {"config.json": {"size": 2, "sha256": null}}}'
    (tmp_path / "jllm-download.json").write_text(good.replace("SHA", "0" * 40))
    expected = {"repo": "a/b", "revision": "0" * 40}
    assert origin(tmp_path) == origin(tmp_path / "config.json") == expected
    assert origin(tmp_path / "other.gguf") is None


@pytest.mark.parametrize("shards", [1, 2])
def test_shards_without_an_index_are_a_model(hub: HubServer, dest: Path | None, shards: int) -> None:
    weights = {f"model-{n + 1:05}-of-{shards:05}.safetensors": noise(str(n), 20_000) for n in range(shards)}
    files = {"config.json": b"{}", **weights}
    hub.add(ID, {**files, "README.md": b"# A model"})
    assert downloaded(download(ID, dest)) == files


def test_shards_without_an_index_that_are_not_all_there_are_no_model(hub: HubServer) -> None:
    hub.add(ID, {"config.json": b"{}", "model-00001-of-00009.safetensors": b"x"})
    message = error_of(ID)
    assert "lacks model-00002-of-00009.safetensors, " in message
    assert "and 3 more" in message
