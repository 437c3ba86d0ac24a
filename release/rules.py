"""Rules that a release must meet and that files and history alone decide: address, tree, versions, bounds, readme."""

import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

from release import changelogs
from release.address import PLACEHOLDER, address, text_files
from release.history import changed_files, released, uncommitted
from release.packages import VERSION, Package, ReleaseError

ALL = "all"
"""In place of a package, for what is of the whole repository."""

URLS = ("Homepage", "Documentation", "Repository", "Changelog", "Issues")


@dataclass(frozen=True)
class Finding:
    """What a rule found: a row of the table.

    Attributes:
        rule: its name.
        subject: the package, or ALL.
        ok: whether it is met.
        note: why it is not; or a fact worth a look.
    """

    rule: str
    subject: str
    ok: bool
    note: str = ""


def tree(root: Path) -> Finding:
    """A working tree that is the commit: what is built is what is tagged."""
    files = uncommitted(root)
    return Finding("tree", ALL, not files, f"not committed: {_some(files)}; commit or remove them" if files else "")


def addresses(root: Path, packages: list[Package]) -> Iterator[Finding]:
    """The repository's address: set, and the same in all packages."""
    try:
        owner, name = address(root)
    except ReleaseError as error:
        yield Finding("address", ALL, False, str(error))
        return
    if owner == PLACEHOLDER:
        note = "set the address: hatch run release:address https://github.com/owner/name"
        yield Finding("address", ALL, False, note)
    else:
        # In a file that came later, from a branch with the placeholder; or in a document that speaks of it.
        marks = (f"{PLACEHOLDER}/{name}", f"`{PLACEHOLDER}`")
        texts = {path: (root / path).read_text(encoding="utf-8") for path in text_files(root)}
        left = [path for path, text in texts.items() if any(mark in text for mark in marks)]
        note = f"the placeholder {PLACEHOLDER} is left in {_some(left)}" if left else f"{owner}/{name}"
        yield Finding("address", ALL, not left, note)
    for package in packages:
        urls = package.project.get("urls", {})
        wrong = [f"no {key}" for key in URLS if key not in urls]
        wrong += [f"{key} is {url}" for key, url in urls.items() if not _of_repository(url, owner, name)]
        yield Finding("urls", package.name, not wrong, f"[project.urls]: {_some(wrong)}" if wrong else "")


def versions(package: Package) -> Finding:
    """A version that is new where the code is, and only there."""
    try:
        text, tags = package.version, released(package)
        version = Version(text)
    except (ReleaseError, InvalidVersion) as error:
        return Finding("version", package.name, False, str(error))
    if not VERSION.fullmatch(text):
        return Finding("version", package.name, False, f"{text} is no version like 1.2.3")
    if not tags:
        return Finding("version", package.name, True, f"{text}, the first release: no tag yet")
    changed = changed_files(package, tags[0])
    if version < tags[0]:
        return Finding("version", package.name, False, f"{text} is older than the tag of {tags[0]}")
    if version == tags[0] and changed:
        note = f"changed since {tags[0]} was tagged: {_some(changed)}; raise {package.about.name}"
        return Finding("version", package.name, False, note)
    if version > tags[0] and not changed:
        return Finding("version", package.name, False, f"{text}, but nothing has changed since {tags[0]}")
    return Finding("version", package.name, True, f"{text}, after {tags[0]}" if changed else f"{text} is released")


def changelog(package: Package, today: datetime.date) -> Finding:
    """An entry of the version, with its day, and nothing that waits."""
    found = changelogs.problems(package.changelog, package.version, today)
    return Finding("changelog", package.name, not found, "; ".join(found))


def bounds(package: Package, others: list[Package]) -> Finding:
    """Bounds between the packages: from the version that it is tested with to the next that may break it."""
    wrong = []
    by_name = {other.name: other for other in others}
    for wanted in package.siblings():
        other = Version(by_name[wanted.name].version)
        lower = [Version(one.version) for one in wanted.specifier if one.operator == ">="]
        expected = f">={other},<{next_series(other)}"
        if not wanted.specifier.contains(other):
            wrong.append(f"{wanted} does not admit {other}; expected {expected}")
        elif not lower or wanted.specifier.contains(next_series(other)):
            wrong.append(f"{wanted} is not bounded; expected {expected}")
        # Tests run with the sibling as it is here: what a new release needs of it, an older one may not have.
        elif lower[0] != other and is_to_be_released(package):
            wrong.append(f"{wanted} admits what the tests have not seen; expected {expected}")
    return Finding("bounds", package.name, not wrong, "; ".join(wrong))


def readme(package: Package) -> Finding:
    """A README whose links lead somewhere on PyPI, which shows it without the repository around it."""
    text = (package.folder / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    relative = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?://|#", target)]
    return Finding("readme", package.name, not relative, f"relative links: {_some(relative)}" if relative else "")


def next_series(version: Version) -> Version:
    """The next version that may break what uses this one: of 0.1.2 it is 0.2, of 1.2.3 it is 2."""
    return Version(f"0.{version.minor + 1}" if version.major == 0 else f"{version.major + 1}")


def is_to_be_released(package: Package) -> bool:
    """Whether the package has a version that is not tagged yet, as far as its history tells."""
    try:
        tags = released(package)
    except ReleaseError:  # `versions` tells it
        return True
    return not tags or Version(package.version) > tags[0]


def _of_repository(url: str, owner: str, name: str) -> bool:
    # To its end, or to what ends a name: another repository's may begin with it.
    here = "|".join(
        re.escape(start) for start in (f"https://github.com/{owner}/{name}", f"https://{owner}.github.io/{name}")
    )
    return re.match(rf"({here})([/#]|$)", url) is not None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
