"""Blocks of code in a document, and whether they are to be run."""

import re
from dataclasses import dataclass

LANGUAGES = ("sh", "bash", "console", "python")
NOT_CODE = ("text", "json", "yaml", "toml", "mermaid")
"""Languages of what nobody runs. Every other is an error, so that no block of commands is passed over."""

# A fence in a quotation or beside a list's mark, which is no opening here, is found as well.
FENCE = re.compile(r"[\s>*+-]*(?:\d+\. *)?(`{3,}(?=[^`]*$)|~{3,}).*")
OPENING = re.compile(r"( *)``` *([^\s`~]*)(?: [^`]*)?")
NOT_RUN = re.compile(r" *<!-- not run: (.+) -->")


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

    Raises:
        ValueError: a block of which it is not clear what is to be run.
    """
    found = []
    lines = document.split("\n")
    number = 0
    while number < len(lines):
        if FENCE.fullmatch(lines[number]) is None:
            number += 1
            continue
        opening = OPENING.fullmatch(lines[number])
        if opening is None:
            raise ValueError(f"line {number + 1}: {lines[number].strip()!r}; expected a fence of three backticks")
        indent, language = len(opening[1]), opening[2]
        if language not in LANGUAGES + NOT_CODE:
            raise ValueError(
                f"line {number + 1}: the language {language!r}; expected {', '.join(LANGUAGES)}, "
                f"or of what nobody runs {', '.join(NOT_CODE)}"
            )
        end = next((n for n in range(number + 1, len(lines)) if lines[n].strip() == "```"), None)
        if end is None:
            raise ValueError(f"line {number + 1}: a block without an end")
        inside = [line[indent:] for line in lines[number + 1 : end]]
        why = NOT_RUN.fullmatch(lines[number - 1]) if number else None
        if language == "console":  # of what is typed and answered, what is typed
            inside = _typed(inside)
            if not inside:
                raise ValueError(f"line {number + 1}: no command in it; expected lines that begin with '$ '")
        if language in LANGUAGES:
            found.append(Block(language, number + 1, "\n".join(inside) + "\n", why[1] if why else None))
        number = end + 1
    return found


def _typed(lines: list[str]) -> list[str]:
    """The commands of a console: lines after ``$``, and those that go on after a backslash or a ``>``."""
    typed: list[str] = []
    after_typed = False
    for line in lines:
        goes_on = after_typed and (line.startswith("> ") or typed[-1].endswith("\\"))
        after_typed = goes_on or line.startswith("$ ")
        if after_typed:
            typed.append(re.sub(r"^[$>] ", "", line))
    return typed


def settings(document: str) -> dict[str, str]:
    """What a document says of its blocks in comments: ``after``, another whose blocks come first, and ``devices``."""
    return dict(re.findall(r"^<!-- (after|devices): (.+) -->$", document, flags=re.M))
