"""Packages of the workspace, as their files describe them."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

NAMES = ("jllm-core", "jllm-convert", "jllm-runtime")
"""The packages, each behind those that it depends on."""

VERSION_LINE = re.compile(r'^__version__ = "([^"]*)"$', re.MULTILINE)


VERSION = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*)){2}")
"""Versions that are released: three numbers. No pre-releases or post-releases, epochs or local parts."""


class ReleaseError(Exception):
    """Something that keeps a command of this folder from its work; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """A package.

    Attributes:
        name: as it is published.
        root: the folder of the repository.
    """

    name: str
    root: Path

    @property
    def path(self) -> str:
        """The package's folder, relative to the repository's."""
        return f"packages/{self.name}"

    @property
    def folder(self) -> Path:
        """The package's folder."""
        return self.root / self.path

    @property
    def module(self) -> str:
        """The name that it is imported by."""
        return self.name.replace("-", "_")

    @property
    def about(self) -> Path:
        """The file with the version."""
        return self.folder / "src" / self.module / "__about__.py"

    @property
    def version(self) -> str:
        """The version that the sources have.

        Raises:
            ReleaseError: the file has none.
        """
        match = VERSION_LINE.search(self.about.read_text(encoding="utf-8"))
        if match is None:
            raise ReleaseError(f'{self.about} has no version; expected a line like __version__ = "0.1.0"')
        return match[1]

    @property
    def changelog(self) -> Path:
        """The file of what has changed."""
        return self.folder / "CHANGELOG.md"

    @property
    def project(self) -> dict[str, Any]:
        """The table ``[project]`` of its pyproject.toml."""
        text = (self.folder / "pyproject.toml").read_text(encoding="utf-8")
        project: dict[str, Any] = tomllib.loads(text)["project"]
        return project

    @property
    def extras(self) -> dict[str, list[str]]:
        """What each extra asks for."""
        extras: dict[str, list[str]] = self.project.get("optional-dependencies", {})
        return extras

    @property
    def commands(self) -> list[str]:
        """The commands that it installs."""
        return sorted(self.project.get("scripts", {}))

    def siblings(self) -> list[Requirement]:
        """What it asks for of the other packages, always; extras are its own affair."""
        wanted = [Requirement(text) for text in self.project["dependencies"]]
        return [one for one in wanted if one.name in NAMES]


def packages(root: Path, names: tuple[str, ...] = NAMES) -> list[Package]:
    """The packages of these names, in the order of NAMES."""
    return [Package(name, root) for name in NAMES if name in names]
