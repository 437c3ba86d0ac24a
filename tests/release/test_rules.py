"""What must hold before a release, on small repositories that do and do not meet it."""

import subprocess
from pathlib import Path

import pytest
from packaging.version import Version

from release import __main__ as command
from release import changelogs, rules
from release.address import PLACEHOLDER, address, set_address
from release.history import changed_files, released
from release.packages import NAMES, Package, ReleaseError, packages
from release.rules import Finding
from tests.release.repository import PLACE, TODAY, commit, git, replace


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
