"""What must hold before a release, on small repositories that do and do not meet it; and the files for GitHub."""

import datetime
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

from release import __main__ as command
from release import archives, changelogs, installs, rules
from release.address import PLACEHOLDER, address, set_address
from release.history import changed_files, released
from release.packages import NAMES, Package, ReleaseError, packages
from release.rules import Finding

ROOT = Path(__file__).parents[1]
TODAY = datetime.date(2020, 6, 15)
SIBLING = {"jllm-core": "", "jllm-convert": "jllm-core[checkpoint]>=0.1,<0.2", "jllm-runtime": "jllm-core>=0.1.0,<0.2"}
# Written so that a change of the repository's address leaves it alone.
PLACE = "/".join([PLACEHOLDER, "jllm"])


def git(root: Path, *arguments: str) -> None:
    author = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=0")
    subprocess.run(["git", "-C", root, *author, *arguments], check=True, capture_output=True)


def commit(root: Path) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-q", "--allow-empty", "-m", "change")


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository of three small packages that may be released."""
    root = tmp_path / "repository"
    urls = "".join(f'{key} = "https://github.com/someone/jllm"\n' for key in rules.URLS)
    for name in NAMES:
        package = Package(name, root)
        package.about.parent.mkdir(parents=True)
        package.about.write_text('"""The version."""\n\n__version__ = "0.1.0"\n')
        (package.about.parent / "__init__.py").write_text("__all__ = []\nfrom .__about__ import __version__\n")
        package.changelog.write_text(
            "# Changelog\n\n## [Unreleased]\n\n## [0.1.0] - 2020-06-01\n\n### Added\n\n- All.\n"
        )
        (package.folder / "README.md").write_text("# Name\n\n[more](https://github.com/someone/jllm)\n")
        (package.folder / "tests").mkdir()
        (package.folder / "tests" / "test_it.py").write_text("")
        (package.folder / "pyproject.toml").write_text(
            '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n\n'
            f'[project]\nname = "{name}"\nreadme = "README.md"\nrequires-python = ">=3.11"\ndescription = "x"\n'
            f"dependencies = [{f'{SIBLING[name]!r}' if SIBLING[name] else ''}]\n"
            f'dynamic = ["version"]\n\n[project.urls]\n{urls}\n'
            "[project.optional-dependencies]\nmore = []\n\n"
            f'[tool.hatch.version]\npath = "src/{package.module}/__about__.py"\n'
        )
    (root / ".gitignore").write_text("__pycache__/\n")
    git(root, "init", "-q", "-b", "main")
    commit(root)
    return root


@pytest.fixture
def core(root: Path) -> Package:
    return Package("jllm-core", root)


def unmet(root: Path) -> list[tuple[str, str]]:
    """The rules that read files and history and are not met."""
    everything = packages(root)
    findings = [rules.tree(root), *rules.addresses(root, everything)]
    for package in everything:
        findings += [rules.versions(package), rules.changelog(package, TODAY), rules.bounds(package, everything)]
        findings.append(rules.readme(package))
    return [(finding.rule, finding.subject) for finding in findings if not finding.ok]


def test_a_first_release_may_be_made(root: Path) -> None:
    assert unmet(root) == []
    assert "first release: no tag yet" in rules.versions(Package("jllm-core", root)).note


# ---- Tree and versions.


def test_what_is_not_committed_is_told(root: Path) -> None:
    (root / "new.txt").touch()
    assert unmet(root) == [("tree", "all")]
    assert "new.txt" in rules.tree(root).note


def test_code_that_has_changed_since_its_tag_needs_a_version(core: Package, root: Path) -> None:
    git(root, "tag", "jllm-core-v0.1.0")
    assert rules.versions(core).note == "0.1.0 is released"

    # What no user sees needs none.
    (core.folder / "tests" / "test_it.py").write_text("pass\n")
    replace(core.changelog, "- All.", "- All of it.")
    commit(root)
    assert changed_files(core, Version("0.1.0")) == []
    assert rules.versions(core).ok

    (core.about.parent / "model.py").touch()
    commit(root)
    found = rules.versions(core)
    assert not found.ok
    assert "src/jllm_core/model.py" in found.note
    replace(core.about, "0.1.0", "0.1.1")
    commit(root)
    assert rules.versions(core) == Finding("version", "jllm-core", True, "0.1.1, after 0.1.0")


@pytest.mark.parametrize(
    "version", ["0.0.9", "0.1.0.dev1", "1.0.0.post1", "1!1.0.0", "1.0.0+a", "1.0", "01.0.0", "one"]
)
def test_versions_that_are_none_or_old(core: Package, root: Path, version: str) -> None:
    git(root, "tag", "jllm-core-v0.1.0")
    replace(core.about, "0.1.0", version)
    commit(root)
    assert not rules.versions(core).ok


def test_a_version_without_a_change_is_told(core: Package, root: Path) -> None:
    git(root, "tag", "jllm-core-v0.2.0")
    assert "is older than the tag of 0.2.0" in rules.versions(core).note
    git(root, "tag", "-d", "jllm-core-v0.2.0")
    git(root, "tag", "jllm-core-v0.0.9")
    assert "nothing has changed since 0.0.9" in rules.versions(core).note


def test_tags_are_told_apart_and_sorted_as_versions(core: Package, root: Path) -> None:
    for tag in ("jllm-core-v0.9.0", "jllm-core-v0.10.0", "jllm-convert-v0.11.0", "other"):
        git(root, "tag", tag)
    assert released(core) == [Version("0.10.0"), Version("0.9.0")]
    git(root, "tag", "jllm-core-vnext")
    assert "a tag of jllm-core has no version" in rules.versions(core).note


def test_a_clone_without_history_is_refused(core: Package, root: Path, tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "-q", "--depth=1", root.as_uri(), tmp_path / "shallow"], check=True)
    commit(root)
    assert rules.versions(core).ok
    shallow = packages(tmp_path / "shallow")
    assert "fetch --unshallow" in rules.versions(shallow[0]).note
    replace(shallow[2].folder / "pyproject.toml", ">=0.1.0", ">=0.0.9")
    assert not rules.bounds(shallow[2], shallow).ok


# ---- Changelogs.


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("[0.1.0] - 2020-06-01", "[0.0.9] - 2020-06-01", "no entry: expected `## [0.1.0] - YYYY-MM-DD`"),
        (" - 2020-06-01", "", "has the date None"),
        ("2020-06-01", "2020-6-1", "has the date '2020-6-1'"),
        ("2020-06-01", "2020-06-31", "has the date '2020-06-31'"),
        ("2020-06-01", "2020-07-01", "the date 2020-07-01 is in the future"),
        ("- All.", "", "the entry of 0.1.0 is empty"),
        ("[Unreleased]", "[Unreleased]\n\n- More.", "entries stand under [Unreleased]"),
        ("- All.", "- All.\n\n## [0.0.9] - 2020-06-02\n\n- x", "the dates do not go from new to old"),
        ("## [0.1.0]", "## 0.1.0", "is none of"),
    ],
)
def test_changelogs_that_are_not_ready(core: Package, old: str, new: str, problem: str) -> None:
    replace(core.changelog, old, new)
    found = rules.changelog(core, TODAY)
    assert not found.ok
    assert problem in found.note


def test_prepare_writes_version_and_heading(core: Package, root: Path) -> None:
    with pytest.raises(ReleaseError, match="has nothing under"):
        command.prepare(root, "jllm-core", "0.2.0", TODAY)
    replace(core.changelog, "[Unreleased]", "[Unreleased]\n\n### Fixed\n\n- One thing.")
    before = core.changelog.read_text()
    for version in ("0.1", "0.0.1", "0.2.0rc1", "0.2.0.post1", "1!0.2.0", "0.2.0+a", "x", "0.1.0"):
        with pytest.raises(ReleaseError):
            command.prepare(root, "jllm-core", version, TODAY)
    assert core.changelog.read_text() == before
    command.prepare(root, "jllm-core", "0.2.0", TODAY)
    assert core.version == "0.2.0"
    assert [(part.version, part.date, part.text) for part in changelogs.entries(core.changelog)] == [
        ("Unreleased", None, ""),
        ("0.2.0", "2020-06-15", "### Fixed\n\n- One thing."),
        ("0.1.0", "2020-06-01", "### Added\n\n- All."),
    ]
    assert rules.changelog(core, TODAY).ok


def test_links_at_the_end_are_no_entry(core: Package) -> None:
    core.changelog.write_text("# Changelog\n\n## [0.1.0] - 2020-01-01\n\n- x\n\n[0.1.0]: https://github.com/a/b\n")
    assert changelogs.entries(core.changelog)[0].text == "- x"


# ---- Bounds, links and addresses.


@pytest.mark.parametrize(
    ("bound", "problem"),
    [
        (">=0.2,<0.3", "does not admit 0.1.0"),
        (">=0.1", "is not bounded"),
        (">=0.1,<1", "is not bounded"),
        ("<0.2", "is not bounded"),
        (">=0.0.9,<0.2", "admits what the tests have not seen"),
    ],
)
def test_bounds_between_packages(root: Path, bound: str, problem: str) -> None:
    runtime = Package("jllm-runtime", root)
    assert rules.bounds(runtime, packages(root)).ok
    replace(runtime.folder / "pyproject.toml", "jllm-core>=0.1.0,<0.2", f"jllm-core{bound}")
    found = rules.bounds(runtime, packages(root))
    assert not found.ok
    assert problem in found.note


def test_a_package_that_is_released_already_keeps_its_bounds(core: Package, root: Path) -> None:
    replace(core.about, "0.1.0", "0.1.1")
    commit(root)
    runtime = Package("jllm-runtime", root)
    assert "expected >=0.1.1,<0.2" in rules.bounds(runtime, packages(root)).note
    git(root, "tag", "jllm-runtime-v0.1.0")
    assert rules.bounds(runtime, packages(root)).ok


def test_the_next_series_of_a_version() -> None:
    assert [str(rules.next_series(Version(text))) for text in ("0.1.9", "0.9.0", "1.2.3")] == ["0.2", "0.10", "2"]


def test_relative_links_of_a_readme_are_told(core: Package) -> None:
    text = "[a](../../docs/a.md) [b](#b) [c](https://x) ```[d](d.md)```\n![e](e.png)\n"
    (core.folder / "README.md").write_text(text)
    assert rules.readme(core).note == "relative links: ../../docs/a.md, e.png"


def test_the_placeholder_is_refused_and_set_everywhere(root: Path) -> None:
    for name in NAMES:
        replace(root / "packages" / name / "pyproject.toml", "someone/jllm", PLACE)
    (root / "note.md").write_text(
        f'git+https://github.com/{PLACE}#subdirectory=x "{PLACE}" '
        f"https://{PLACEHOLDER}.github.io/jllm/a {PLACE}-other\n"
    )
    (root / "image.png").write_bytes(b"\0" + PLACE.encode())
    commit(root)
    assert unmet(root) == [("address", "all")]
    (finding, *_) = rules.addresses(root, packages(root))
    assert finding.note.startswith("set the address: hatch run release:address ")

    for bad in ("https://gitlab.com/a/b", "github.com/a/b", "https://github.com/a", "https://github.com/a/b/c"):
        with pytest.raises(ReleaseError, match="is no address of a repository"):
            set_address(root, bad)
    changed = set_address(root, "https://github.com/some-one/llm.jax.git")
    assert changed == ["note.md", *(f"packages/{name}/pyproject.toml" for name in sorted(NAMES))]
    assert (root / "note.md").read_text() == (
        "git+https://github.com/some-one/llm.jax#subdirectory=x "
        f'"some-one/llm.jax" https://some-one.github.io/llm.jax/a {PLACE}-other\n'
    )
    commit(root)
    assert address(root) == ("some-one", "llm.jax")
    assert unmet(root) == []
    # And again, to another.
    assert len(set_address(root, "https://github.com/b/c")) == 4
    assert unmet(root) == [("tree", "all")]


def test_a_placeholder_that_came_later_is_found(root: Path) -> None:
    (root / "notebook.py").write_text(f"# git+https://github.com/{PLACE}\n")
    (root / "install.md").write_text(f"`{PLACEHOLDER}` is your account\n")
    commit(root)
    (finding, *_) = rules.addresses(root, packages(root))
    assert finding.note.endswith("is left in install.md, notebook.py")


def test_urls_of_a_package(core: Package, root: Path) -> None:
    pyproject = core.folder / "pyproject.toml"
    replace(pyproject, 'Issues = "https://github.com/someone/jllm"\n', "")
    replace(pyproject, 'Homepage = "https://github.com/someone/jllm"', 'Homepage = "https://example.org"')
    found = {finding.subject: finding for finding in rules.addresses(root, packages(root))}
    assert found["jllm-core"].note == "[project.urls]: no Issues, Homepage is https://example.org"
    assert found["jllm-runtime"].ok


@pytest.mark.parametrize(
    ("url", "ok"),
    [
        ("https://github.com/someone/jllm#readme", True),
        ("https://github.com/someone/jllm/issues", True),
        ("https://someone.github.io/jllm/", True),
        ("https://github.com/someone/jllm-other", False),
        ("https://someone.github.io/jllm2/", False),
    ],
)
def test_an_address_that_begins_like_the_repositorys_is_another(core: Package, root: Path, url: str, ok: bool) -> None:
    replace(core.folder / "pyproject.toml", 'Issues = "https://github.com/someone/jllm"', f'Issues = "{url}"')
    found = {finding.subject: finding for finding in rules.addresses(root, packages(root)) if finding.rule == "urls"}
    assert found["jllm-core"].ok is ok


# ---- Archives and installs.


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


# ---- The commands.


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


# ---- This repository.


def test_this_repository_meets_what_does_not_wait_for_the_day() -> None:
    everything = packages(ROOT)
    assert len({package.project["urls"]["Repository"] for package in everything}) == 1
    assert [finding for finding in rules.addresses(ROOT, everything) if not finding.ok and finding.rule == "urls"] == []
    for package in everything:
        assert rules.readme(package).ok, rules.readme(package)
        below = changelogs.entries(package.changelog)
        # Ready as it is, or with what release:prepare does.
        assert below[0].version in (changelogs.UNRELEASED, package.version)
        assert below[0].text or below[1].text


def workflow_files() -> list[Path]:
    return sorted((ROOT / ".github").rglob("*.yml"))


def steps_of(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


def test_github_reads_its_files() -> None:
    names = {path.relative_to(ROOT / ".github").as_posix() for path in workflow_files()}
    assert {f"workflows/{name}.yml" for name in ("ci", "site", "release")} <= names
    assert {f"ISSUE_TEMPLATE/{name}.yml" for name in ("bug", "feature", "model", "config")} <= names
    for path in workflow_files():
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.parent.name == "workflows":
            # YAML takes `on` for a truth value.
            assert {"name", True, "jobs"} <= set(content), path
            for job in content["jobs"].values():
                assert "timeout-minutes" in job, path
        elif path.name != "config.yml":
            kinds = [field["type"] for field in content["body"]]
            assert set(kinds) <= {"markdown", "input", "textarea", "dropdown", "checkboxes"}
            ids = [field["id"] for field in content["body"] if field["type"] != "markdown"]
            assert len(ids) == len(set(ids))
            assert {"name", "description", "body"} <= set(content)


def test_the_commands_of_the_workflows_are_there() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["envs"]
    ran = "\n".join(
        step["run"]
        for path in workflow_files()
        if "workflows" in path.parts
        for step in steps_of(path)
        if "run" in step
    )
    named = re.findall(r"hatch run (?:([\w-]+):)?([\w-]+)", ran)
    assert {("release", "build"), ("docs", "build")} <= set(named)
    for environment, script in named:
        assert script in scripts[environment or "default"]["scripts"], (environment, script)
    assert re.search(r"^ *\.ci/run$", ran, re.M)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    (site,) = (
        step["with"]["path"] for step in steps_of(ROOT / ".github/workflows/site.yml") if "path" in step.get("with", {})
    )
    assert f"\nsite_dir: {site}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_actions_have_a_version() -> None:
    for path in workflow_files():
        if "workflows" in path.parts:
            for step in steps_of(path):
                assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"]), step


def test_the_citation_has_what_is_cited() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "type", "license", "repository-code"} <= set(citation)
    assert citation["license"] == "Apache-2.0"
    assert citation["repository-code"] == Package("jllm-core", ROOT).project["urls"]["Repository"]
