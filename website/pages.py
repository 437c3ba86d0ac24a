"""Pages of the site that are no files under ``docs/``: notebooks, commands, Python names, other documents."""

import base64
import html
import importlib
import inspect
import pkgutil
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import click
import latex2mathml.converter
from nbformat import NotebookNode

from website import notebooks
from website.address import BRANCH, REPOSITORY

ROOT = Path(__file__).parents[1]
# Documents that are read on the site as well, by their paths in the repository, and the pages that they become.
DOCUMENTS = {
    "CONTRIBUTING.md": "internals/contributing.md",
    "SECURITY.md": "internals/security.md",
    "examples/README.md": "examples.md",
    "fuzz/README.md": "internals/fuzzing.md",
    **{f"packages/{name}/README.md": f"packages/{name}.md" for name in ("jllm-core", "jllm-convert", "jllm-runtime")},
    **{
        f"packages/{name}/CHANGELOG.md": f"packages/{name}-changes.md"
        for name in ("jllm-core", "jllm-convert", "jllm-runtime")
    },
}
COMMANDS = {"jllm": "jllm_runtime.cli", "jllm-convert": "jllm_convert.cli"}
PACKAGES = ("jllm_core", "jllm_convert", "jllm_runtime")
OPS = "jllm_core.ops"
_WIDTH = {"terminal_width": 80, "max_content_width": 80}


def page_of(path: str) -> str | None:
    """The page that a file of the repository is read on, by its path from the root; None where it has none."""
    if path in DOCUMENTS:
        return DOCUMENTS[path]
    if path.startswith("notebooks/") and path.endswith((".py", ".ipynb")):
        return f"{path.removeprefix('notebooks/').rpartition('.')[0]}.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def with_links(markdown: str, path: str) -> str:
    """A document with its relative links as the site has them: to its pages, or to the file in the repository.

    Args:
        path: the document's path from the repository's root.

    Links that lead nowhere stay as they are; the site's build names them.
    """
    page = page_of(path)
    if page is None:
        raise ValueError(f"{path} is no page of the site")

    def replace(link: re.Match[str]) -> str:
        target, hash_, anchor = link[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return link[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        other = page_of(there)
        if other is not None:
            address = posixpath.relpath(other, posixpath.dirname(page) or ".")
        elif (ROOT / there).exists():
            address = f"{REPOSITORY}/{'tree' if (ROOT / there).is_dir() else 'blob'}/{BRANCH}/{there}"
        else:
            return link[0]
        return f"{link[1]}({address}{hash_}{anchor})"

    # Not in blocks of code.
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.S | re.M)
    return "".join(part if part.startswith("```") else re.sub(r"(\])\(([^)\s]+)\)", replace, part) for part in parts)


def with_mathml(page: str) -> str:
    """A page's HTML with its formulas, which pymdownx.arithmatex has marked, as MathML."""

    def replace(formula: re.Match[str]) -> str:
        display: Literal["block", "inline"] = "block" if formula[1] == "div" else "inline"
        return latex2mathml.converter.convert(html.unescape(formula[2]).strip(), display=display)

    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', replace, page, flags=re.S)


def documents() -> Iterator[tuple[str, str]]:
    """Pages from documents elsewhere in the repository: path and Markdown."""
    for path, page in DOCUMENTS.items():
        if (ROOT / path).exists():
            yield page, with_links((ROOT / path).read_text("utf-8"), path)


def commands() -> Iterator[tuple[str, str]]:
    """A page for each command: path and Markdown, of what ``--help`` prints for it and for each of its parts."""
    for name, module in COMMANDS.items():
        group = importlib.import_module(module).cli
        yield f"reference/{name}.md", "\n".join([f"# {name}\n", *_help(group, name, level=2)])


def api() -> Iterator[tuple[str, str]]:
    """A page for each package, of its public names, and one for the maths of jllm-core: path and Markdown."""
    for name in PACKAGES:
        module = importlib.import_module(name)
        names = [each for each in module.__all__ if not each.startswith("__")]
        yield (
            f"reference/{name}.md",
            "\n".join([f"# {name}\n", f"{inspect.getdoc(module)}\n", *(f"::: {name}.{each}\n" for each in names)]),
        )
    ops = [each.name for each in pkgutil.iter_modules(importlib.import_module(OPS).__path__, f"{OPS}.")]
    yield f"reference/{OPS}.md", "\n".join([f"# {OPS}\n", *(f"::: {each}\n" for each in ops)])


def _help(command: click.Command, name: str, level: int, parent: click.Context | None = None) -> Iterator[str]:
    context = click.Context(
        command, info_name=name.rpartition(" ")[2], parent=parent, **(command.context_settings | _WIDTH)
    )
    if parent is not None:
        yield f"{'#' * level} {name}\n"
    yield f"```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            part = command.get_command(context, each)
            if part is not None and not part.hidden:
                yield from _help(part, f"{name} {each}", level + (parent is not None), context)


def notebook_pages() -> Iterator[tuple[str, str | bytes]]:
    """The pages of notebooks, and their figures: path and content. Notebooks are executed for it, once a version."""
    for source in notebooks.sources():
        notebook = notebooks.executed(source)
        path = source.relative_to(ROOT).as_posix()
        page = page_of(path)
        assert page is not None  # as sources lie in notebooks/
        folder = page.removesuffix(".md")
        markdown, figures = notebook_markdown(notebook, posixpath.basename(folder), notebooks.badges(source))
        yield page, with_links(markdown, path)
        for name, content in figures.items():
            yield f"{folder}/{name}", content


def notebook_markdown(notebook: NotebookNode, folder: str, badges: str) -> tuple[str, dict[str, bytes]]:
    """An executed notebook as a page.

    Args:
        folder: where the figures will lie, from the page.
        badges: what stands under the title.

    Returns:
        Markdown, and the figures by their names.
    """
    parts: list[str] = []
    figures: dict[str, bytes] = {}
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(_markdown(cell.source, badges if index == 0 else ""))
            continue
        code = f"```python\n{cell.source}\n```"
        if "figure" in notebooks.tags(cell) or "check" in notebooks.tags(cell):
            title = "The code of the figure" if "figure" in notebooks.tags(cell) else "The check"
            code = f'??? note "{title}"\n\n{_indented(code)}'
        outputs = []
        for output in cell.outputs:
            text, figure = _output(output)
            if figure:
                name = f"figure-{len(figures) + 1}.png"
                figures[name] = figure
                title = re.match(r"# Figure: (.*)", cell.source)
                outputs.append(f"![{title[1] if title else 'Figure'}]({folder}/{name})")
            elif text:
                outputs.append(f'```text {{ .output title="Output" }}\n{text.rstrip()}\n```')
        # A figure is read before the code that draws it.
        parts += [*outputs, code] if "figure" in notebooks.tags(cell) else [code, *outputs]
    return "\n\n".join(parts) + "\n", figures


def _markdown(source: str, badges: str) -> str:
    if badges:
        title, _, rest = source.partition("\n")
        source = f"{title}\n\n{badges}\n{rest}"
    folded = re.fullmatch(r"<details><summary>(.*?)</summary>\n(.*)\n</details>\s*", source, flags=re.S)
    return f'??? success "{folded[1]}"\n\n{_indented(folded[2].strip())}' if folded else source


def _output(output: NotebookNode) -> tuple[str, bytes | None]:
    """The text or picture of a cell's output. Text of programs' progress, on stderr, is left out."""
    if output.output_type == "stream":
        return ("" if output.name == "stderr" else _overwritten(output.text)), None
    if output.output_type == "error":
        return "\n".join(re.sub(r"\x1b\[[0-9;]*m", "", line) for line in output.traceback), None
    data = output.data
    if "image/png" in data:
        return "", base64.b64decode(data["image/png"])
    return data.get("text/plain", ""), None


def _overwritten(text: str) -> str:
    """Text as a terminal leaves it: a carriage return overwrites its line, which is dropped if it is empty then."""

    def line(written: str) -> str:
        shown = ""
        for part in written.removesuffix("\r").split("\r"):
            shown = part + shown[len(part) :]
        return shown.rstrip()

    lines = [(line(written), "\r" in written) for written in text.split("\n")]
    return "\n".join(shown for shown, was_overwritten in lines if shown or not was_overwritten)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.split("\n"))
