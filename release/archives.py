"""Wheels and source archives: built twice and compared, built from each other, and looked at as PyPI does."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from release.history import commit_time
from release.packages import Package, ReleaseError
from release.rules import Finding

LEFT_OUT = shutil.ignore_patterns("__pycache__", "dist", ".*_cache")


def run(*command: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> str:
    """What a program prints, run without the packages of this folder on its path.

    Raises:
        ReleaseError: it fails; with the end of what it printed.
    """
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**inherited, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ReleaseError(f"{' '.join(map(str, command))}: {done.stdout.strip()[-600:]}")
    return done.stdout


def build(folder: Path, out: Path, time: int, targets: tuple[str, ...] = ("sdist", "wheel")) -> list[Path]:
    """Build a package's archives, with the files' times as they are in a release.

    Args:
        folder: the package's, with its pyproject.toml.
        out: where they go.
        time: seconds since 1970.
        targets: of hatchling.

    Returns:
        The archives.
    """
    wanted = [option for target in targets for option in ("--target", target)]
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(out), *wanted]
    run(*command, cwd=folder, environment={"SOURCE_DATE_EPOCH": str(time)})
    return sorted(out.iterdir())


def check(package: Package, out: Path, scratch: Path) -> Iterator[Finding]:
    """Build a package into ``out``, and see that its archives are the same whenever and wherever they are built.

    Args:
        package: the package.
        out: the folder for its archives; those of other packages may be in it.
        scratch: a folder for all else.
    """
    time = commit_time(package.root)
    try:
        built = build(package.folder, scratch / f"{package.name}-first", time)
        # Elsewhere, and with times of files and rights for others that a checkout somewhere else might give them.
        copy = scratch / f"{package.name}-copy" / "packages" / package.name
        shutil.copytree(package.folder, copy, ignore=LEFT_OUT, copy_function=shutil.copy)
        # The repository's own: hatchling puts it into the source archive.
        if (package.root / ".gitignore").exists():
            shutil.copy(package.root / ".gitignore", copy.parents[1])
        for path in copy.rglob("*"):
            if path.is_file():
                os.utime(path, (0, 10**9))
                path.chmod(path.stat().st_mode & 0o700 | 0o040)
        again = build(copy, scratch / f"{package.name}-second", time)
        differing = _differing(built, again)
        yield Finding("reproducible", package.name, not differing, _told(differing, "built twice, it is not the same"))

        (sdist,) = (path for path in built if path.name.endswith(".tar.gz"))
        unpacked = scratch / f"{package.name}-unpacked"
        with tarfile.open(sdist) as tar:
            tar.extractall(unpacked, filter="data")
        (inside,) = unpacked.iterdir()
        from_sdist = build(inside, scratch / f"{package.name}-from-sdist", time, ("wheel",))
        differing = _differing([path for path in built if path.suffix == ".whl"], from_sdist)
        yield Finding("sdist", package.name, not differing, _told(differing, "the source archive's wheel is another"))
        for path in built:
            shutil.copy(path, out)
    except ReleaseError as error:
        yield Finding("build", package.name, False, str(error))
        return
    try:
        run(sys.executable, "-m", "twine", "check", "--strict", *built, cwd=package.root)
        yield Finding("metadata", package.name, True)
    except ReleaseError as error:
        yield Finding("metadata", package.name, False, str(error))


def _differing(one: list[Path], other: list[Path]) -> list[str]:
    first, second = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths} for paths in (one, other)
    )
    return sorted(name for name in {*first, *second} if first.get(name) != second.get(name))


def _told(names: list[str], problem: str) -> str:
    return f"{problem}: {', '.join(names)}" if names else ""
