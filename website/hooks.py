"""MkDocs hooks: pages from outside of ``docs/``, links between the two, formulas, and a script for diagrams."""

import importlib.util
import itertools
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from website import pages

ROOT = Path(__file__).parents[1]
MERMAID = "javascripts/mermaid.js"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here, and Mermaid, which draws diagrams, so that no reader's browser fetches it."""
    made = (pages.documents(), pages.commands(), pages.api(), pages.notebook_pages(), [(MERMAID, _mermaid())])
    for path, content in itertools.chain.from_iterable(made):
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links of a file under ``docs/`` at pages of the site; generated pages have theirs already."""
    source = page.file.abs_src_path
    if source is None or not Path(source).is_relative_to(config.docs_dir):
        return markdown
    return pages.with_links(markdown, Path(source).relative_to(ROOT).as_posix())


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write formulas as MathML, which browsers draw by themselves."""
    return pages.with_mathml(html)


def _mermaid() -> str:
    """Mermaid's code, as the package mermaidx brings it."""
    spec = importlib.util.find_spec("mermaidx")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the site's diagrams need the package mermaidx; `hatch run docs` has it")
    return (Path(spec.origin).parent / "assets" / "mermaid.js").read_text("utf-8")
