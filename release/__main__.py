"""Commands for releases: ``check``, ``address``, ``prepare`` and ``build``, by ``hatch run release:NAME``."""

import argparse
import datetime
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packaging.version import Version

from release import archives, changelogs, installs, rules
from release.address import set_address
from release.history import commit_time, head, tag_of, tagged, uncommitted
from release.packages import NAMES, VERSION, VERSION_LINE, Package, ReleaseError, packages
from release.rules import Finding

ROOT = Path(__file__).parents[1]


def check(root: Path, names: tuple[str, ...], quick: bool, wanted: list[str]) -> Iterator[Finding]:
    """All that must hold before packages are released.

    Args:
        root: the repository.
        names: of the packages; all are built, for they need each other.
        quick: leave the installs out.
        wanted: Pythons for the installs; those of the classifiers where it is empty.
    """
    asked, everything = packages(root, names), packages(root)
    yield rules.tree(root)
    yield from rules.addresses(root, everything)
    # A day more, for days begin earlier where somebody else may have written the date.
    latest = datetime.date.today() + datetime.timedelta(days=1)
    for package in asked:
        yield rules.versions(package)
        yield rules.changelog(package, latest)
        yield rules.bounds(package, everything)
        yield rules.readme(package)
    with tempfile.TemporaryDirectory(prefix="jllm-release-") as folder:
        scratch, wheels = Path(folder), Path(folder) / "wheels"
        wheels.mkdir()
        built = True
        for package in everything:
            for finding in archives.check(package, wheels, scratch):
                built = built and finding.rule != "build"
                if package in asked or not finding.ok:
                    yield finding
        if quick or not built:
            return
        interpreters, missing = installs.pythons(wanted)
        yield from missing
        for python, path in interpreters.items():
            for package in asked:
                yield from installs.check(package, wheels, python, path, scratch)


def prepare(root: Path, name: str, version: str, day: datetime.date) -> None:
    """Write a release's version and its changelog's heading; the dates and bounds of others are left alone.

    Raises:
        ReleaseError: no version, one that is older, or a changelog without anything to release.
    """
    package = Package(name, root)
    if not VERSION.fullmatch(version):
        raise ReleaseError(f"{version} is no version like 1.2.3")
    if Version(version) < Version(package.version):
        raise ReleaseError(f"{version} is older than {package.version}, which {package.about} has")
    changelogs.release_heading(package.changelog, version, day)
    text = package.about.read_text(encoding="utf-8")
    package.about.write_text(VERSION_LINE.sub(f'__version__ = "{version}"', text), encoding="utf-8")


def build(root: Path, tag: str, out: Path) -> list[Path]:
    """Build the archives of a tag's package, for publishing.

    Raises:
        ReleaseError: the tag does not name a package and its version, or is not that of this commit; the tree is not
            clean; or ``out`` has something.
    """
    match = re.fullmatch(rf"({'|'.join(NAMES)})-v(.+)", tag)
    if match is None:
        raise ReleaseError(
            f"{tag} is no tag of a release; expected one like {tag_of(Package(NAMES[0], root), '1.2.3')}"
        )
    package = Package(match[1], root)
    if match[2] != package.version:
        raise ReleaseError(f"the tag is {tag}, but {package.about} says {package.version}")
    commit = tagged(root, tag)
    if commit is None:
        raise ReleaseError(f"there is no tag {tag} here; make it, or fetch it: git fetch --tags")
    if commit != head(root):
        raise ReleaseError(
            f"{tag} is commit {commit[:12]}, but the tree is at {head(root)[:12]}; run: git checkout {tag}"
        )
    if files := uncommitted(root):
        raise ReleaseError(f"not committed: {', '.join(files[:3])}")
    if out.exists() and any(out.iterdir()):
        raise ReleaseError(f"{out} is not empty; remove it first")
    out.mkdir(parents=True, exist_ok=True)
    return archives.build(package.folder, out, commit_time(root))


def show(findings: Iterator[Finding]) -> bool:
    """Print a row for each finding as it comes, and how many are not met at the end; whether all are."""
    count = failed = 0
    for finding in findings:
        count, failed = count + 1, failed + (not finding.ok)
        row = f"{'ok' if finding.ok else 'FAIL':5} {finding.rule:14} {finding.subject:26} {finding.note}"
        print(row.rstrip(), flush=True)
    print(f"{count} checks, " + (f"{failed} not met" if failed else "all met"))
    return not failed


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="release", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("check", help="all that must hold before a release; exit code 1 where something does not")
    one.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"of {', '.join(NAMES)} (default: all)")
    one.add_argument("--quick", action="store_true", help="leave out the installs")
    one.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="VERSION_OR_PATH",
        help=f"install for this one; may be given several times (default: {', '.join(installs.PYTHONS)})",
    )
    one = commands.add_parser("address", help="write the repository's address everywhere")
    one.add_argument("url", metavar="URL", help="https://github.com/owner/name")
    one = commands.add_parser("prepare", help="write a version, and date the changelog")
    one.add_argument("package", choices=NAMES)
    one.add_argument("version", metavar="VERSION", help="such as 0.1.0")
    one.add_argument("--date", type=datetime.date.fromisoformat, default=None, help="default: today")
    one = commands.add_parser("build", help="build the wheel and the source archive of a tag, for publishing")
    one.add_argument("tag", metavar="TAG", help="such as jllm-core-v0.1.0")
    one.add_argument("--out", type=Path, default=ROOT / "dist" / "release", help="default: dist/release")
    return top


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Run a command; its exit code is 1 where a check is not met, 2 for bad input."""
    args = parser().parse_args(arguments)
    try:
        if args.command == "check":
            if unknown := [name for name in args.packages if name not in NAMES]:
                raise ReleaseError(f"there is no package {unknown[0]}; expected some of {', '.join(NAMES)}")
            found = check(root, tuple(args.packages) or NAMES, args.quick, args.python)
            return 0 if show(found) else 1
        if args.command == "address":
            changed = set_address(root, args.url)
            print(f"{len(changed)} files have it now; look at the difference, and commit it")
        elif args.command == "prepare":
            prepare(root, args.package, args.version, args.date or datetime.date.today())
            print(f"{args.package} {args.version}: look at the difference, and commit it")
        else:
            print(*build(root, args.tag, args.out), sep="\n")
    except ReleaseError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
