"""Address of the repository: where it stands, and a change of it everywhere."""

import re
from pathlib import Path

from release.history import git
from release.packages import Package, ReleaseError

PLACEHOLDER = "OWNER"
"""The owner, as long as nobody has published the repository."""

HOST = "https://github.com/"
# Of GitHub, for badges, workflows and the site's address are.
ADDRESS = re.compile(re.escape(HOST) + r"([A-Za-z0-9][A-Za-z0-9-]*)/([A-Za-z0-9._-]+?)(?:\.git)?/?")


def address(root: Path) -> tuple[str, str]:
    """Owner and name of the repository, as jllm-core's metadata have them.

    Raises:
        ReleaseError: they have none.
    """
    url = Package("jllm-core", root).project.get("urls", {}).get("Repository", "")
    match = ADDRESS.fullmatch(url)
    if match is None:
        raise ReleaseError(
            f"packages/jllm-core/pyproject.toml: [project.urls] Repository is {url!r}; expected {HOST}owner/name"
        )
    return match[1], match[2]


def set_address(root: Path, url: str) -> list[str]:
    """Write another address into every file that has the present one.

    Three spellings are told apart from other words: ``owner/name`` behind a slash or a quote (links, badges, commands
    that install), and the site's ``owner.github.io/name``.

    Args:
        root: the repository.
        url: the new address.

    Returns:
        The files that were changed.

    Raises:
        ReleaseError: it is no address of a repository on GitHub.
    """
    match = ADDRESS.fullmatch(url)
    if match is None:
        raise ReleaseError(f"{url} is no address of a repository; expected {HOST}owner/name")
    old_owner, old_name = address(root)
    owner, name = match.groups()
    spellings = [
        (re.compile(rf"(?<=[/\"' ]){re.escape(f'{old_owner}/{old_name}')}(?![\w-])"), f"{owner}/{name}"),
        (re.compile(rf"{re.escape(f'{old_owner}.github.io/{old_name}')}(?![\w-])"), f"{owner}.github.io/{name}"),
    ]
    changed = []
    for path in text_files(root):
        before = text = (root / path).read_text(encoding="utf-8")
        for pattern, new in spellings:
            text = pattern.sub(new, text)
        if text != before:
            (root / path).write_text(text, encoding="utf-8", newline="")
            changed.append(path)
    return changed


def text_files(root: Path) -> list[str]:
    """The tracked files that are text."""
    found = []
    for name in git(root, "ls-files", "-z").split("\0"):
        path = root / name
        if name and path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            if b"\0" not in content and b"\r" not in content and _is_utf8(content):
                found.append(name)
    return found


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
