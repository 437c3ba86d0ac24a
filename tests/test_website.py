"""Pages of the site that are made from other things: links, formulas, notebooks, help, names of Python."""

import base64
import importlib
import tomllib
from pathlib import Path

import click
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from packaging.requirements import Requirement

from website import pages

PNG = b"\x89PNG\r\n"


@pytest.mark.parametrize(
    ("path", "link", "wanted"),
    [
        ("docs/backends.md", "[a](../packages/jllm-core/README.md)", "[a](packages/jllm-core.md)"),
        ("docs/guides/run.md", "[a](../engine.md#words)", "[a](../engine.md#words)"),
        ("packages/jllm-runtime/README.md", "[a](../../docs/engine.md)", "[a](../engine.md)"),
        ("CONTRIBUTING.md", "[a](docs/backends.md)", "[a](../backends.md)"),
        (
            "docs/index.md",
            "[a](../tests/parity)",
            "[a](https://github.com/OWNER/jllm/tree/main/tests/parity)",
        ),
        ("docs/index.md", "[a](../LICENSE)", "[a](https://github.com/OWNER/jllm/blob/main/LICENSE)"),
        ("docs/index.md", "[a](https://example.org/b.md) [c](#d)", "[a](https://example.org/b.md) [c](#d)"),
        ("docs/index.md", "[a](../none.md)", "[a](../none.md)"),
        ("docs/index.md", "```\n[a](../LICENSE)\n```", "```\n[a](../LICENSE)\n```"),
    ],
)
def test_links_lead_to_pages_or_into_the_repository(path: str, link: str, wanted: str) -> None:
    assert pages.with_links(link, path) == wanted


def test_formulas_become_mathml_and_code_stays() -> None:
    inline = '<p><span class="arithmatex">\\(a &lt; b\\)</span> <code>\\(c\\)</code></p>'
    page = f'{inline}<div class="arithmatex">\\[d\\]</div>'
    made = pages.with_mathml(page)
    assert made.count("<math ") == 2
    assert 'display="inline"><mrow><mi>a</mi><mo>&#x0003C;</mo><mi>b</mi>' in made
    assert 'display="block"><mrow><mi>d</mi>' in made
    assert "<code>\\(c\\)</code>" in made


def test_a_notebook_becomes_a_page() -> None:
    picture = new_output("display_data", {"image/png": base64.b64encode(PNG).decode(), "text/plain": "<Figure>"})
    printed = new_output("stream", name="stdout", text="1\n")
    progress = new_output("stream", name="stderr", text="loading\n")
    notebook = new_notebook(
        cells=[
            new_markdown_cell("# 1. Title\n\nText."),
            new_code_cell("print(1)", outputs=[progress, printed]),
            new_code_cell("# Figure: a line.\nplot()", metadata={"tags": ["figure"]}, outputs=[picture]),
            new_code_cell("check()", metadata={"tags": ["check"]}),
            new_markdown_cell("<details><summary>A solution</summary>\n\n```python\nx\n```\n\n</details>"),
        ]
    )
    markdown, figures = pages.notebook_markdown(notebook, "01_a", "[Open](x)")
    assert figures == {"figure-1.png": PNG}
    assert markdown == (
        "# 1. Title\n\n[Open](x)\n\nText.\n\n"
        "```python\nprint(1)\n```\n\n"
        '```text { .output title="Output" }\n1\n```\n\n'
        "![a line.](01_a/figure-1.png)\n\n"
        '??? note "The code of the figure"\n\n    ```python\n    # Figure: a line.\n    plot()\n    ```\n\n'
        '??? note "The check"\n\n    ```python\n    check()\n    ```\n\n'
        '??? success "A solution"\n\n    ```python\n    x\n    ```\n'
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("loading a ...\rloading b ...\r             \rdone\n", "done"),
        ("a\n50 %\r100 %\nb\n", "a\n100 %\nb"),
        ("longer\rab\n", "abnger"),
        ("a\r\n\nb\n", "a\n\nb"),  # ends of lines as Windows has them, and an empty line that was printed
        ("a\nloading ...\r           \r\nb\n", "a\nb"),
        ("loading ...\r           \r", None),
    ],
)
def test_what_a_cell_overwrote_is_not_on_its_page(text: str, wanted: str | None) -> None:
    notebook = new_notebook(cells=[new_code_cell("f()", outputs=[new_output("stream", name="stdout", text=text)])])
    markdown, _ = pages.notebook_markdown(notebook, "01_a", "")
    shown = "" if wanted is None else f'\n```text {{ .output title="Output" }}\n{wanted}\n```\n'
    assert markdown == f"```python\nf()\n```\n{shown}"


def test_the_commands_page_has_the_help_of_every_command() -> None:
    made = dict(pages.commands())
    for name, module in pages.COMMANDS.items():
        page = made[f"reference/{name}.md"]
        group = importlib.import_module(module).cli
        assert isinstance(group, click.Group)
        for command in group.commands:
            assert f"\n## {name} {command}\n" in page
            assert f"Usage: {name} {command} " in page


def test_the_reference_has_every_public_name() -> None:
    made = dict(pages.api())
    for package in pages.PACKAGES:
        for name in importlib.import_module(package).__all__:
            assert name == "__version__" or f"::: {package}.{name}\n" in made[f"reference/{package}.md"]
    assert "::: jllm_core.ops.attention\n" in made["reference/jllm_core.ops.md"]


def test_the_environment_of_the_site_has_what_its_notebooks_serve_with() -> None:
    """Notebooks start servers: without the extra, the site of a fresh clone fails where the tests' own is built."""
    root = Path(__file__).parents[1]
    workspace = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    runtime = tomllib.loads((root / "packages" / "jllm-runtime" / "pyproject.toml").read_text("utf-8"))
    there = {Requirement(each).name for each in workspace["tool"]["hatch"]["envs"]["docs"]["dependencies"]}
    assert {Requirement(each).name for each in runtime["project"]["optional-dependencies"]["serve"]} <= there
