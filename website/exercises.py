"""Exercises of the book: three cells each, to fill in, to check, and with a solution; tried with wrong answers too.

The cell to fill in (tagged ``exercise``) stands under a heading ``### Exercise N.K: ...``. The cell that checks it
(tagged ``check``) prints "Exercise N.K: your turn." while nothing is filled in, "Exercise N.K: right." for a right
answer, and raises ``AssertionError`` for a wrong one. The solution stands in folded Markdown.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

WRONG_ANSWERS = Path(__file__).parents[1] / "tests" / "notebooks" / "wrong_answers"
SOLUTION = "<details><summary>A solution</summary>\n\n"


@dataclass(frozen=True)
class Exercise:
    """An exercise: its name, such as 2.1, the index of the cell to fill in, the right answer, and wrong ones."""

    name: str
    index: int
    right: str
    wrong: tuple[str, ...]


def exercises(notebook: NotebookNode, stem: str) -> list[Exercise]:
    """The exercises of a notebook.

    Raises:
        ValueError: one has no heading, check, solution or wrong answer as described above.
    """
    found = []
    wrong = _wrong_answers(stem)
    for index, cell in enumerate(notebook.cells):
        if "exercise" not in cell.metadata.get("tags", []):
            continue
        named = re.match(r"### Exercise (\d+\.\d+): ", notebook.cells[index - 1].source)
        check, solution = notebook.cells[index + 1 : index + 3]
        code = re.findall(r"```python\n(.*?)```", solution.source, flags=re.S)
        if not named or "check" not in check.metadata.get("tags", []) or len(code) != 1:
            raise ValueError(f"{stem}: expected a heading, this cell, its check and its solution at {cell.source!r}")
        if not solution.source.startswith(SOLUTION) or named[1] not in wrong:
            raise ValueError(f"{stem}: exercise {named[1]} has no folded solution, or no wrong answer")
        found.append(Exercise(named[1], index, code[0], tuple(wrong[named[1]])))
    if stray := wrong.keys() - {exercise.name for exercise in found}:
        raise ValueError(f"{stem}: wrong answers to no exercise: {sorted(stray)}")
    return found


def try_answers(client: NotebookClient, exercise: Exercise) -> dict[str, Any]:
    """What the check says of the wrong answers and of the right one: what it printed, or the error's name.

    The cell as it was is executed again at the end: later cells find what they would have found.
    """
    check, unfilled = (client.nb.cells[exercise.index + place].source for place in (1, 0))
    return {
        "wrong": [_said_of(client, answer, check) for answer in exercise.wrong],
        "right": _said_of(client, exercise.right, check),
        "again": _said_of(client, unfilled, check),
    }


def _said_of(client: NotebookClient, answer: str, check: str) -> str:
    cells = client.nb.cells
    cells += [new_code_cell(answer), new_code_cell(check)]
    try:
        client.execute_cell(cells[-2], len(cells) - 2)
        client.execute_cell(cells[-1], len(cells) - 1)
        return "".join(output.text for output in cells[-1].outputs if output.output_type == "stream")
    except CellExecutionError as error:
        return str(error.ename)
    finally:
        del cells[-2:]


def _wrong_answers(stem: str) -> dict[str, list[str]]:
    """The wrong answers in a script with a cell ``# %% N.K`` for each."""
    path = WRONG_ANSWERS / f"{stem}.py"
    if not path.exists():
        return {}
    _, *parts = re.split(r"^# %% (\d+\.\d+)\n", path.read_text("utf-8"), flags=re.M)
    answers: dict[str, list[str]] = {}
    for name, answer in zip(parts[::2], parts[1::2], strict=True):
        answers.setdefault(name, []).append(answer)
    return answers
