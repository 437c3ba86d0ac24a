"""Files of a folder that may not be read: links that lead out of it, pipes, JSON of any size or depth."""

import os
import socket
from pathlib import Path

import pytest
from jllm_convert.errors import ConversionError
from jllm_convert.files import model_folder
from jllm_convert.files.model_folder import ModelFolder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    return path


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside.json"
    path.write_text('{"secret": 1}')
    return path


def problem_of(folder: Path, name: str = "a.json") -> str:
    with pytest.raises(ConversionError) as caught:
        ModelFolder(folder).read_json(name)
    (problem,) = caught.value.problems
    return problem


def test_a_file_is_found_and_read(folder: Path) -> None:
    (folder / "a.json").write_text('{"a": [1, {"b": null}]}')
    opened = ModelFolder(folder)
    file = opened.file("a.json")
    assert file is not None
    assert (file.name, file.path, file.size) == ("a.json", (folder / "a.json").resolve(), 23)
    assert opened.read_json("a.json") == {"a": [1, {"b": None}]}
    assert opened.names == {"a.json"}


def test_what_is_not_there_is_none(folder: Path) -> None:
    assert ModelFolder(folder).file("a.json") is None
    assert ModelFolder(folder).read_json("a.json") is None


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("absent", "file"):
        with pytest.raises(ConversionError, match=f"{name} cannot be opened as a folder: "):
            ModelFolder(tmp_path / name)


# ---- Links


def test_a_link_within_the_folder_is_followed(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "b.json").write_text('{"b": 1}')
    (folder / "a.json").symlink_to("sub/b.json")
    assert ModelFolder(folder).read_json("a.json") == {"b": 1}


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (folder / "b.json").write_text('{"b": 1}')
    (folder / "a.json").symlink_to(folder / "b.json")
    (tmp_path / "linked").symlink_to(folder)
    assert ModelFolder(tmp_path / "linked").read_json("a.json") == {"b": 1}


@pytest.mark.parametrize("way", ["absolute", "relative", "through a link", "through a folder's link"])
def test_a_link_that_leads_out_is_refused(folder: Path, outside: Path, way: str) -> None:
    link = folder / "a.json"
    if way == "absolute":
        link.symlink_to(outside)
    elif way == "relative":
        link.symlink_to("../outside.json")
    elif way == "through a link":
        (folder / "b.json").symlink_to(outside)
        link.symlink_to("b.json")
    else:
        (folder / "sub").symlink_to("..")
        link.symlink_to("sub/outside.json")
    problem = problem_of(folder)
    assert problem.startswith(f"a.json: a link that leads out of the folder, to {outside.resolve()}; ")


def test_a_folder_beside_with_a_longer_name_is_outside(folder: Path) -> None:
    other = folder.with_name("model-2")
    other.mkdir()
    (other / "a.json").write_text("{}")
    (folder / "a.json").symlink_to(other / "a.json")
    assert "leads out of the folder" in problem_of(folder)


def test_links_that_lead_nowhere_or_round_are_refused(folder: Path) -> None:
    (folder / "a.json").symlink_to("absent")
    assert problem_of(folder) == "a.json: a link to a file that is not there; download it again"
    (folder / "b.json").symlink_to("c.json")
    (folder / "c.json").symlink_to("b.json")
    assert problem_of(folder, "b.json").startswith("b.json: cannot be used: Too many levels of symbolic links")


def test_a_folder_in_the_hub_s_cache_may_link_to_the_model_s_own_blobs(tmp_path: Path, outside: Path) -> None:
    cache = tmp_path / "cache"
    own, other = cache / "models--x--y", cache / "models--x--z"
    snapshot = own / "snapshots" / "0123abcd"
    for path in (snapshot, own / "blobs" / "sub", other / "blobs"):
        path.mkdir(parents=True)
    for path in (own / "blobs" / "h1", own / "blobs" / "sub" / "h2", own / "h3", other / "blobs" / "h4"):
        path.write_text('{"a": 1}')
    (own / "blobs" / "h5").symlink_to(outside)
    targets = {
        "own": "blobs/h1",
        "sub": "blobs/sub/h2",
        "beside": "h3",
        "other": "../models--x--z/blobs/h4",
        "on": "blobs/h5",
    }
    for name, target in targets.items():
        (snapshot / name).symlink_to(Path("../..") / target)
    assert ModelFolder(snapshot).read_json("own") == {"a": 1}
    linked = tmp_path / "linked"
    linked.symlink_to(cache)
    assert ModelFolder(linked / "models--x--y" / "snapshots" / "0123abcd").read_json("own") == {"a": 1}
    for name in ("sub", "beside", "other", "on"):
        assert "leads out of the folder" in problem_of(snapshot, name), name


@pytest.mark.parametrize("place", ["x--y/snapshots/r", "models--x--y/other/r", "models--x--y/snapshots/r/deeper"])
def test_blobs_elsewhere_are_outside(tmp_path: Path, place: str) -> None:
    snapshot = tmp_path / place
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "h").write_text("{}")
    (snapshot / "a.json").symlink_to(blobs / "h")
    assert "leads out of the folder" in problem_of(snapshot)


# ---- What is no file


def test_a_pipe_is_refused_and_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "a.json")
    assert problem_of(folder) == "a.json: cannot be used: it is a pipe, not a regular file"


def test_a_folder_a_socket_and_a_device_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a.json").mkdir()
    assert problem_of(folder) == "a.json: cannot be used: it is a folder, not a regular file"
    monkeypatch.chdir(folder)  # the path of a socket has 100 characters at most
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        assert problem_of(folder, "s") == "s: cannot be used: it is a socket, not a regular file"
    with pytest.raises(ConversionError, match="null: cannot be used: it is a device, not a regular file"):
        ModelFolder(Path("/dev")).file("null")


# ---- JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as JSON: Expecting value"),
        ("{", "cannot be read as JSON: Expecting property name"),
        ("[1]", "must hold a JSON object, got list"),
        ("null", "must hold a JSON object, got NoneType"),
        ('{"a": 1, "b": 2, "a": 1}', "cannot be read as JSON: the name 'a' stands twice in one object"),
        ('{"x": [{"a": 1, "a": 1}]}', "the name 'a' stands twice in one object"),
        ("[" * 100_000, "cannot be read as JSON: "),
        ("[" * 100_001, "it holds more than 100,000 lists and objects"),
        ('{"a":' * 90_000, "cannot be read as JSON: "),
        ('{"a": [' + "{}," * 100_000 + "{}]}", "it holds more than 100,000 lists and objects"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read as JSON: "),
        ("\ufeff{}", "cannot be read as JSON: "),
    ],
    ids=range(12),
)
def test_what_is_no_json_object_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "a.json").write_text(text, encoding="utf-8")
    problem = problem_of(folder)
    assert problem.startswith(f"{folder / 'a.json'} ")
    assert message in problem
    assert len(problem) < 1000


def test_bytes_that_are_no_text_are_refused(folder: Path) -> None:
    (folder / "a.json").write_bytes(b'{"a": "\xff"}')
    assert "cannot be read as JSON: 'utf-8' codec can't decode byte 0xff" in problem_of(folder)


def test_json_of_more_than_16_mib_is_refused_unread(folder: Path) -> None:
    with (folder / "a.json").open("wb") as file:
        file.truncate((16 << 20) + 1)
    assert problem_of(folder).endswith("it has 16,777,217 bytes; at most 16,777,216 are read of such a file")


# ---- Copies


def test_a_file_is_copied_slab_by_slab(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "_COPIED_AT_ONCE", 4)
    for content in (b"", b"1234", b"123456789"):
        (folder / "a").write_bytes(content)
        ModelFolder(folder).copy("a", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == content


def test_a_file_that_is_too_large_is_not_copied(folder: Path, tmp_path: Path) -> None:
    with (folder / "a").open("wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(ConversionError, match="a: 268,435,457 bytes; at most 268,435,456 are copied"):
        ModelFolder(folder).copy("a", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_file_that_is_gone_or_cannot_be_read_is_not_copied(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConversionError, match="a: the file is missing from"):
        ModelFolder(folder).copy("a", tmp_path / "copy")
    (folder / "a").write_bytes(b"1234")
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(ConversionError, match="a: cannot be read: the file was cut short"):
        ModelFolder(folder).copy("a", tmp_path / "copy")
