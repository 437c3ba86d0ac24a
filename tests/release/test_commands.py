"""The commands ``check`` and ``build`` on a small repository."""

import re
from pathlib import Path

import pytest

from release import __main__ as command
from release import archives
from tests.release.repository import commit, git


def test_check_ends_with_a_count_and_an_exit_code(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.main(["check", "--quick", "jllm-core"], root) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{len(lines) - 1} checks, all met"
    assert not [line for line in lines if re.match(r"ok +(version|reproducible) +jllm-runtime", line)]
    monkeypatch.setattr(archives, "check", lambda *_: iter(()))  # built once is enough
    (root / "new.txt").touch()
    assert command.main(["check", "--quick", "jllm-core"], root) == 1
    said = capsys.readouterr().out
    assert said.startswith("FAIL  tree ")
    assert said.endswith(" checks, 1 not met\n")
    assert command.main(["check", "jllm"], root) == 2
    assert "there is no package jllm;" in capsys.readouterr().err


def test_build_makes_what_a_tag_names(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "dist"
    git(root, "tag", "-a", "-m", "release", "jllm-convert-v0.1.0")
    assert command.main(["build", "jllm-convert-v0.1.0", "--out", str(out)], root) == 0
    assert [path.name for path in sorted(out.iterdir())] == [
        "jllm_convert-0.1.0-py3-none-any.whl",
        "jllm_convert-0.1.0.tar.gz",
    ]
    for tag, problem in (
        ("jllm-convert-v0.1.1", "says 0.1.0"),
        ("v0.1.0", "is no tag of a release"),
        ("jllm-core-v0.1.0", "there is no tag jllm-core-v0.1.0 here"),
        ("jllm-convert-v0.1.0", "is not empty"),
    ):
        assert command.main(["build", tag, "--out", str(out)], root) == 2
        assert problem in capsys.readouterr().err


def test_build_refuses_a_tag_of_another_commit(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    git(root, "tag", "jllm-core-v0.1.0")
    commit(root)
    # A branch of the same name is no tag.
    git(root, "branch", "jllm-core-v0.1.0")
    out = tmp_path / "dist"
    assert command.main(["build", "jllm-core-v0.1.0", "--out", str(out)], root) == 2
    assert "but the tree is at" in capsys.readouterr().err
    assert not out.exists()
