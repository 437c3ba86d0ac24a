"""Small repositories of packages that may be released, and what changes them."""

import datetime
import subprocess
from pathlib import Path

from release.address import PLACEHOLDER

ROOT = Path(__file__).parents[2]
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
