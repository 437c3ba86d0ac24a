"""A repository to try the rules of releases on."""

from pathlib import Path

import pytest

from release import rules
from release.packages import NAMES, Package
from tests.release.repository import SIBLING, commit, git


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
