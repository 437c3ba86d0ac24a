"""The time that the first three chapters take: an hour, for somebody who knows numpy."""

import re
from pathlib import Path

import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from website import notebooks

# Of a text that explains; of code that is read to be understood; of an exercise that is tried before it is looked up.
WORDS_A_MINUTE, CODE_LINES_A_MINUTE, MINUTES_AN_EXERCISE = 200, 12, 2
MAX_MINUTES, MAX_WORDS, MAX_CODE_CELLS, MAX_CODE_LINES = 60, 1300, 20, 130
FIRST = [source for source in notebooks.sources() if source.parent.name == "book"][:3]


def words(notebook: NotebookNode) -> int:
    """Words of prose, solutions left out: they are for those whom the exercise has held up."""
    prose = " ".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    prose = re.sub(r"<details>.*?</details>", "", prose, flags=re.S)
    return len(re.findall(r"[\w'`.-]*\w[\w'`.-]*", prose))


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """All but those that install."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and "install" not in notebooks.tags(cell)]


def code_lines(notebook: NotebookNode) -> int:
    """Lines that say something, without those that only draw, which are folded away."""
    read = [cell.source for cell in code_cells(notebook) if "figure" not in notebooks.tags(cell)]
    return sum(bool(line.strip()) for source in read for line in source.splitlines())


def minutes(notebook: NotebookNode) -> float:
    """How long a chapter takes."""
    tries = sum("exercise" in notebooks.tags(cell) for cell in notebook.cells)
    reading = words(notebook) / WORDS_A_MINUTE + code_lines(notebook) / CODE_LINES_A_MINUTE
    return reading + MINUTES_AN_EXERCISE * tries


def test_three_chapters_take_an_hour() -> None:
    assert [source.name[:2] for source in FIRST] == ["01", "02", "03"]
    assert sum(minutes(notebooks.read(source)) for source in FIRST) <= MAX_MINUTES


@pytest.mark.parametrize("source", FIRST, ids=lambda source: source.stem)
def test_a_chapter_is_short(source: Path) -> None:
    notebook = notebooks.read(source)
    assert words(notebook) <= MAX_WORDS
    assert len(code_cells(notebook)) <= MAX_CODE_CELLS
    assert code_lines(notebook) <= MAX_CODE_LINES


def test_what_is_counted() -> None:
    notebook = new_notebook(
        cells=[
            new_markdown_cell(
                "# A title\n\nIt's `q @ k` here. <details><summary>No</summary>\nfour words of it</details>"
            ),
            new_code_cell("%pip install a", metadata={"tags": ["install"]}),
            new_code_cell("a = 1\n\nb = 2", metadata={"tags": ["exercise"]}),
            new_code_cell("# Figure: a\nplot(a)", metadata={"tags": ["figure"]}),
        ]
    )
    assert (words(notebook), len(code_cells(notebook)), code_lines(notebook)) == (6, 2, 2)
    assert minutes(notebook) == pytest.approx(6 / 200 + 2 / 12 + 2)
