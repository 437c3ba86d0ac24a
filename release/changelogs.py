"""Changelogs in the form of Keep a Changelog: their headings, and the heading of a release."""

import datetime
import re
from dataclasses import dataclass
from pathlib import Path

from release.packages import ReleaseError

UNRELEASED = "Unreleased"
HEADING = re.compile(r"^## (.*)$", re.MULTILINE)
NAMED = re.compile(r"\[([^\]]+)\](?: - (.*))?")


@dataclass(frozen=True)
class Entry:
    """A version's part of a changelog.

    Attributes:
        version: of the heading; UNRELEASED for what comes next.
        date: as it stands in the heading; None without one.
        text: below the heading, without links at the end of the file.
    """

    version: str
    date: str | None
    text: str

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing, be it under headings such as ``### Added``."""
        return all(line.startswith("#") for line in self.text.splitlines() if line.strip())


def entries(path: Path) -> list[Entry]:
    """The parts of a changelog, from its top.

    Raises:
        ReleaseError: a heading is not of the form.
    """
    text = path.read_text(encoding="utf-8")
    found = list(HEADING.finditer(text))
    parts = []
    for heading, following in zip(found, [*found[1:], None], strict=True):
        match = NAMED.fullmatch(heading[1])
        if match is None:
            raise ReleaseError(f"{path}: the heading {heading[0]!r} is none of `## [1.2.3] - 2030-12-31`")
        below = text[heading.end() : following.start() if following else len(text)]
        below = re.sub(r"^\[[^\]]+\]: \S+$", "", below, flags=re.MULTILINE)
        parts.append(Entry(match[1], match[2], below.strip()))
    return parts


def problems(path: Path, version: str, today: datetime.date) -> list[str]:
    """What keeps a version from being released with this changelog.

    Args:
        path: the changelog.
        version: the one that is to be released.
        today: no release is of a later day.
    """
    try:
        parts = entries(path)
    except ReleaseError as error:
        return [str(error)]
    by_version = {part.version: part for part in parts}
    found = []
    waiting = by_version.get(UNRELEASED)
    if waiting and not waiting.is_empty:
        found.append(
            f"entries stand under [{UNRELEASED}]; move them to {version}, as release:prepare does, or raise the version"
        )
    if version not in by_version:
        found.append(f"no entry: expected `## [{version}] - YYYY-MM-DD`")
    elif by_version[version].is_empty:
        found.append(f"the entry of {version} is empty")
    dated = [part for part in parts if part.version != UNRELEASED]
    days = []
    for part in dated:
        try:
            days.append(_day(part))
        except ValueError:
            found.append(f"[{part.version}] has the date {part.date!r}; expected YYYY-MM-DD")
    if days and max(days) > today:
        found.append(f"the date {max(days)} is in the future")
    if days != sorted(days, reverse=True):
        found.append("the dates do not go from new to old")
    return found


def release_heading(path: Path, version: str, day: datetime.date) -> None:
    """Give what is unreleased the heading of a version, and begin a new, empty part above it.

    Raises:
        ReleaseError: nothing is unreleased, or the version has an entry already.
    """
    parts = {part.version: part for part in entries(path)}
    if version in parts:
        raise ReleaseError(f"{path} has an entry of {version} already")
    if UNRELEASED not in parts or parts[UNRELEASED].is_empty:
        raise ReleaseError(f"{path} has nothing under [{UNRELEASED}], so there is nothing to release")
    text = path.read_text(encoding="utf-8")
    heading = f"## [{UNRELEASED}]"
    text = text.replace(heading, f"{heading}\n\n## [{version}] - {day.isoformat()}", 1)
    path.write_text(text, encoding="utf-8")


def _day(entry: Entry) -> datetime.date:
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", entry.date or ""):
        raise ValueError(entry.date)
    return datetime.date.fromisoformat(entry.date or "")
