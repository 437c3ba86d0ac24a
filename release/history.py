"""What git knows of a package: its tags, and what has changed since the last."""

import subprocess
from pathlib import Path

from packaging.version import InvalidVersion, Version

from release.packages import Package, ReleaseError

NO_CODE = ("CHANGELOG.md", "tests/")
"""Below a package's folder, what may change without a new version: a user's copy is none the other for it."""


def git(root: Path, *arguments: str) -> str:
    """What a command of git prints.

    Raises:
        ReleaseError: it fails.
    """
    done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"git {' '.join(arguments)} failed in {root}: {done.stderr.strip()}")
    return done.stdout


def tag_of(package: Package, version: str) -> str:
    """The name of a release's tag."""
    return f"{package.name}-v{version}"


def released(package: Package) -> list[Version]:
    """The versions that have tags behind this commit, the newest first.

    Raises:
        ReleaseError: the tags are not there, or one of them is of no version.
    """
    if git(package.root, "rev-parse", "--is-shallow-repository").strip() == "true":
        raise ReleaseError("this clone has no history, so its tags say nothing; run: git fetch --unshallow --tags")
    prefix = tag_of(package, "")
    names = git(package.root, "tag", "--list", f"{prefix}*", "--merged", "HEAD").split()
    try:
        return sorted((Version(name.removeprefix(prefix)) for name in names), reverse=True)
    except InvalidVersion as error:
        raise ReleaseError(f"a tag of {package.name} has no version: {error}; delete it, or name it anew") from error


def changed_files(package: Package, version: Version) -> list[str]:
    """The files of a package that differ from a release's, as far as users see them."""
    names = git(package.root, "diff", "--name-only", tag_of(package, str(version)), "HEAD", "--", package.path)
    inside = [name.removeprefix(f"{package.path}/") for name in names.splitlines()]
    return [name for name in inside if not name.startswith(NO_CODE)]


def uncommitted(root: Path) -> list[str]:
    """Files that differ from the last commit, or are not in it."""
    return [line[3:] for line in git(root, "status", "--porcelain").splitlines()]


def tagged(root: Path, tag: str) -> str | None:
    """The commit that a tag points at, as a hash; None where there is no such tag."""
    try:
        return git(root, "rev-parse", "--verify", "--quiet", f"refs/tags/{tag}^{{commit}}").strip()
    except ReleaseError:
        return None


def head(root: Path) -> str:
    """The commit of the working tree, as a hash."""
    return git(root, "rev-parse", "HEAD").strip()


def commit_time(root: Path) -> int:
    """When the last commit was made, in seconds since 1970: the time of all files of a release."""
    return int(git(root, "log", "-1", "--format=%ct"))
