"""Archives and installs of small packages."""

import re
import sys
from pathlib import Path

import pytest

from release import archives, installs
from release.packages import Package
from tests.release.repository import ROOT, commit, replace


def test_archives_are_the_same_twice_and_from_each_other(core: Package, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    found = {finding.rule: finding for finding in archives.check(core, tmp_path / "out", tmp_path)}
    assert {rule: finding.ok for rule, finding in found.items()} == {
        "reproducible": True,
        "sdist": True,
        "metadata": True,
    }, found
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        "jllm_core-0.1.0-py3-none-any.whl",
        "jllm_core-0.1.0.tar.gz",
    ]


def test_archives_that_differ_and_metadata_that_is_refused(core: Package, root: Path, tmp_path: Path) -> None:
    # A build that writes the place where it runs into the package, and a README that is no Markdown.
    (core.folder / "hatch_build.py").write_text(
        "import pathlib\n"
        "from hatchling.builders.hooks.plugin.interface import BuildHookInterface\n"
        "class Hook(BuildHookInterface):\n"
        "    def initialize(self, version, build_data):\n"
        "        pathlib.Path(self.root, 'src/jllm_core/place.txt').write_text(self.root)\n"
    )
    pyproject = core.folder / "pyproject.toml"
    replace(pyproject, "[tool.hatch.version]", "[tool.hatch.build.hooks.custom]\n\n[tool.hatch.version]")
    (core.folder / "README.rst").write_text(".. none::\n\nTitle\n=\n")
    replace(pyproject, "README.md", "README.rst")
    commit(root)
    (tmp_path / "out").mkdir()
    found = {finding.rule: finding for finding in archives.check(core, tmp_path / "out", tmp_path)}
    assert {rule: finding.ok for rule, finding in found.items()} == {
        "reproducible": False,
        "sdist": False,
        "metadata": False,
    }, found
    assert "jllm_core-0.1.0-py3-none-any.whl" in found["reproducible"].note

    replace(pyproject, 'name = "jllm-core"', 'name = "not a name"')
    (finding,) = archives.check(core, tmp_path / "out", tmp_path / "again")
    assert (finding.rule, finding.ok) == ("build", False)


def test_installs_are_tried(core: Package, root: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert all(finding.ok for finding in archives.check(core, tmp_path / "out", tmp_path))
    findings = [*installs.check(core, tmp_path / "out", "this", sys.executable, tmp_path)]
    assert [(finding.rule, finding.subject, finding.ok) for finding in findings] == [
        ("install this", "jllm-core", True),
        ("install this", "jllm-core[more]", True),
    ], findings
    # A name that the package promises and has not.
    replace(core.about.parent / "__init__.py", "__all__ = []", "__all__ = ['none']")
    commit(root)
    (tmp_path / "other").mkdir()
    for _ in archives.check(core, tmp_path / "other", tmp_path / "second"):
        pass
    findings = [*installs.check(core, tmp_path / "other", "this", sys.executable, tmp_path)]
    assert [finding.ok for finding in findings] == [False, False]
    assert "has no attribute 'none'" in findings[0].note


def test_a_sibling_is_the_wheel_that_was_built(
    core: Package, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Package("jllm-runtime", root)
    replace(runtime.folder / "pyproject.toml", "more = []", "more = []\ntpu = []")
    wheels, index = tmp_path / "wheels", tmp_path / "index" / "jllm-core"
    wheels.mkdir()
    for package in (core, runtime):
        archives.build(package.folder, wheels, 10**9, ("wheel",))
    # A stranger's, within the bounds, in the only index that there is.
    replace(core.about, "0.1.0", "0.1.9")
    (stranger,) = archives.build(core.folder, index, 10**9, ("wheel",))
    (index / "index.html").write_text(f'<a href="{stranger.name}">{stranger.name}</a>')
    monkeypatch.setenv("UV_DEFAULT_INDEX", index.parent.as_uri())
    for setting in ("UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS"):
        monkeypatch.delenv(setting, raising=False)

    findings = [*installs.check(runtime, wheels, "this", sys.executable, tmp_path)]
    assert [(finding.rule, finding.ok) for finding in findings] == [
        ("install this", True),
        ("install this", True),
        ("resolve this", True),
    ], findings
    assert [path.name for path in (tmp_path / "environment").rglob("jllm_core-*")] == ["jllm_core-0.1.0.dist-info"]

    monkeypatch.setattr(installs, "_from", lambda _: [])
    findings = [*installs.check(runtime, wheels, "this", sys.executable, tmp_path)]
    assert [finding.ok for finding in findings] == [False, False, False]
    assert "installed is jllm-core 0.1.9, expected 0.1.0" in findings[0].note
    assert "resolved is jllm-core==0.1.9 of an index" in findings[2].note


def test_a_python_that_is_not_there_is_told() -> None:
    paths, missing = installs.pythons([sys.executable, "3.99"])
    assert list(paths) == [sys.executable]
    assert [finding.note for finding in missing] == [
        "there is no Python 3.99 here; install it, or name those to check with --python"
    ]
    classifiers = " ".join(Package("jllm-runtime", ROOT).project["classifiers"])
    assert tuple(re.findall(r"Python :: (3\.\d+)", classifiers)) == installs.PYTHONS


def test_extras_that_are_only_resolved_are_there() -> None:
    assert set(installs.RESOLVED_ONLY) <= set(Package("jllm-runtime", ROOT).extras)
