"""Every notebook, executed as its reader would; its exercises with a wrong answer and with the solution shown."""

from pathlib import Path

import pytest
from nbformat import NotebookNode

from website import notebooks
from website.exercises import exercises

BOOK = [source for source in notebooks.sources() if source.parent.name == "book"]


def printed(cell: NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


@pytest.mark.parametrize("source", notebooks.sources(), ids=lambda source: source.stem)
def test_a_notebook_runs_as_it_is(source: Path) -> None:
    notebook = notebooks.executed(source)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and "install" not in notebooks.tags(cell)]
    assert code
    assert all(cell.execution_count for cell in code)
    for cell in code:
        if "figure" in notebooks.tags(cell):
            assert cell.source.startswith("# Figure: "), cell.source
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source


@pytest.mark.parametrize("source", BOOK, ids=lambda source: source.stem)
def test_exercises_tell_right_from_wrong(source: Path) -> None:
    notebook = notebooks.executed(source)
    found = exercises(notebook, source.stem)
    assert 2 <= len(found) <= 4
    assert all(exercise.wrong for exercise in found)
    for exercise in found:
        turn = f"Exercise {exercise.name}: your turn.\n"
        assert printed(notebook.cells[exercise.index + 1]) == turn
        assert notebook.metadata.answers[exercise.name] == {
            "wrong": ["AssertionError"] * len(exercise.wrong),
            "right": f"Exercise {exercise.name}: right.\n",
            "again": turn,
        }


def test_the_published_files_are_what_their_scripts_say() -> None:
    assert notebooks.outdated() == [], "python -m website.notebooks writes them"


def test_a_published_file_that_is_not_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = tmp_path / "notebooks" / "book"
    book.mkdir(parents=True)
    source = book / "01_a.py"
    source.write_text('# %% [markdown]\n# # 1. A\n# Text.\n\n# %% tags=["figure"]\n# Figure: b\nb = 1\n')
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path / "notebooks")
    assert notebooks.outdated() == [source.with_suffix(".ipynb")]
    source.with_suffix(".ipynb").write_text(notebooks.published(source), encoding="utf-8")
    assert notebooks.outdated() == []
    assert "colab.research.google.com/github/OWNER/jllm/blob/main/notebooks/book/01_a.ipynb" in notebooks.published(
        source
    )
    source.write_text(source.read_text().replace("b = 1", "b = 2"))
    (book / "02_gone.ipynb").write_text("{}")
    assert notebooks.outdated() == [source.with_suffix(".ipynb"), book / "02_gone.ipynb"]


def test_outputs_are_those_of_these_files_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, answers, code = tmp_path / "01_a.py", tmp_path / "answers", tmp_path / "packages" / "a" / "src"
    answers.mkdir()
    code.mkdir(parents=True)
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "WRONG_ANSWERS", answers)
    seen = set()
    # The same bytes, in files of other lengths and names.
    for script, answer, name, content in (
        ("ab", "c", "m.py", "de"),
        ("a", "bc", "m.py", "de"),
        ("ab", "cd", "m.py", "e"),
        ("ab", "c", "n.py", "de"),
    ):
        for path, text in ((source, script), (answers / source.name, answer), (code / name, content)):
            path.write_text(text, encoding="utf-8")
        seen.add(notebooks._hash(source))
        (code / name).unlink()
    monkeypatch.setattr(notebooks.importlib.metadata, "version", lambda _: "0")
    (code / "n.py").write_text("de", encoding="utf-8")
    seen.add(notebooks._hash(source))
    assert len(seen) == 5
