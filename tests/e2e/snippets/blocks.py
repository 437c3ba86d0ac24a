"""Blocks of code in a document, and whether they are to be run."""

import re
from dataclasses import dataclass

LANGUAGES = ("sh", "bash", "console", "python")


@dataclass(frozen=True)
class Block:
    """A block of code: its language, its line in the document, its text, and why it is not run, if it is not."""

    language: str
    line: int
    text: str
    not_run: str | None


def blocks(document: str) -> list[Block]:
    """The blocks of shell commands and Python, those inside of tabs and lists too.

    A comment ``<!-- not run: REASON -->`` in the line above a block keeps it from being run.
    """
    found = []
    lines = document.split("\n")
    number = 0
    while number < len(lines):
        opening = re.fullmatch(r"( *)```(\w+).*", lines[number])
        if opening is None:
            number += 1
            continue
        indent, language = len(opening[1]), opening[2]
        end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == "```")
        text = "\n".join(line[indent:] for line in lines[number + 1 : end]) + "\n"
        why = re.fullmatch(r" *<!-- not run: (.+) -->", lines[number - 1]) if number else None
        if language == "console":  # of what is typed and answered, what is typed
            text = "".join(f"{line[2:]}\n" for line in text.splitlines() if line.startswith("$ "))
        if language in LANGUAGES:
            found.append(Block(language, number + 1, text, why[1] if why else None))
        number = end + 1
    return found


def settings(document: str) -> dict[str, str]:
    """What a document says of its blocks in comments: ``after``, another whose blocks come first, and ``devices``."""
    return dict(re.findall(r"^<!-- (after|devices): (.+) -->$", document, flags=re.M))
