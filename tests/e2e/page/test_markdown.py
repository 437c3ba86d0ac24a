"""What Markdown becomes on the page, and what it must never become."""

import json
import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from .conftest import Complaints, opened, serving
from .fake_server import FakeServer, scripted

# The module's own result, as markup; the page itself never makes any.
RENDER = """async ([text, prefixes]) => {
  const { Markdown } = await import("/static/markdown.js");
  const root = document.createElement("div");
  const markdown = new Markdown(root);
  for (const end of prefixes) markdown.set(text.slice(0, end), true);
  markdown.set(text);
  return root.innerHTML;
}"""
LINK = ' target="_blank" rel="noopener noreferrer"'


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    with serving(FakeServer(scripted)) as server, opened(browser, server.url, Complaints()) as page:
        yield page


def render(page: Page, text: str, prefixes: list[int] | None = None) -> str:
    return page.evaluate(RENDER, [text, prefixes or []])


@pytest.mark.parametrize(
    ("text", "markup"),
    [
        ("plain", "<p>plain</p>"),
        ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
        ("# Big\n###### Small ##", "<h4>Big</h4><h6>Small</h6>"),
        ("#no heading", "<p>#no heading</p>"),
        ("*a* **b** ***c***", "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em></p>"),
        ("_d_ __e__ ~~f~~ ~~~g~~~", "<p><em>d</em> <strong>e</strong> <del>f</del> ~~~g~~~</p>"),
        ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
        ("snake_case_name 2 * 3 * 4 **open", "<p>snake_case_name 2 * 3 * 4 **open</p>"),
        ("**Term:** rest", "<p><strong>Term:</strong> rest</p>"),
        ("`a*b*` ``c ` d`` `open", "<p><code>a*b*</code> <code>c ` d</code> `open</p>"),
        (r"\*a\* \\", r"<p>*a* \</p>"),
        ("***\n---", "<hr><hr>"),
        ("> a\n> b\n>\n> > c", "<blockquote><p>a<br>b</p><blockquote><p>c</p></blockquote></blockquote>"),
        ("- a\n- b", "<ul><li>a</li><li>b</li></ul>"),
        ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("1. a\n  - b\n    - c\n2. d", "<ol><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ol>"),
        ("- a\n  more\n\n  again", "<ul><li><p>a<br>more</p><p>again</p></li></ul>"),
        ("text\n- a\n1. b", "<p>text</p><ul><li>a</li></ul><ol><li>b</li></ol>"),
        ("in 1999. That\n2000. was", "<p>in 1999. That<br>2000. was</p>"),
        ("[a *b*](https://e.org/x_(y) 'title')", f'<p><a href="https://e.org/x_(y)"{LINK}>a <em>b</em></a></p>'),
        ("see https://e.org/a_b_c.", f'<p>see <a href="https://e.org/a_b_c"{LINK}>https://e.org/a_b_c</a>.</p>'),
        ("(<http://e.org>)", f'<p>(<a href="http://e.org/"{LINK}>http://e.org</a>)</p>'),
        ("![alt](https://e.org/i.png)", f'<p><a href="https://e.org/i.png"{LINK}>alt</a></p>'),
        ("a[0] and [1] and [x]", "<p>a[0] and [1] and [x]</p>"),
        (
            "| a | b |\n|:-:|--:|\n| `x\\|y` | 2 |\n| 3 |",
            '<div class="table" tabindex="0" role="region" aria-label="Table"><table><thead><tr>'
            '<th class="align-center" scope="col">a</th><th class="align-right" scope="col">b</th></tr></thead><tbody>'
            '<tr><td class="align-center"><code>x|y</code></td><td class="align-right">2</td></tr>'
            '<tr><td class="align-center">3</td><td class="align-right"></td></tr></tbody></table></div>',
        ),
        ("a | b\nno table", "<p>a | b<br>no table</p>"),
        ("a<br>b", "<p>a<br>b</p>"),
    ],
)
def test_markup(page: Page, text: str, markup: str) -> None:
    assert render(page, text) == markup


@pytest.mark.parametrize(
    ("text", "language", "code"),
    [
        ("```python\nif a:\n\tb < c\n\n  * d\n```\nafter", "python", "if a:\n\tb < c\n\n  * d"),
        ("~~~\n```\n~~~", "", "```"),
        ("````md\n```\nx\n```\n````", "md", "```\nx\n```"),
        ("- item\n  ```\n  inside\n    more\n  ```", "", "inside\n  more"),
        ("```js\nnot closed", "js", "not closed"),
    ],
)
def test_code(page: Page, text: str, language: str, code: str) -> None:
    markup = render(page, text)
    escaped = code.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f'<pre tabindex="0"><code>{escaped}</code></pre>' in markup
    assert f'<div class="code-bar"><span>{language}</span>' in markup


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[a](javascript:alert(1))",
        "[a]( JaVaScRiPt:alert(1))",
        "[a](data:text/html,<script>alert(1)</script>)",
        "[a](vbscript:x) [b](file:///etc/passwd) [c](//e.org) [d](/v1/models) [e](mailto:a@e.org)",
        "<javascript:alert(1)> <a href='https://e.org'>x</a>",
        "![a](javascript:alert(1))",
        '[a](https://e.org" onclick="alert(1))',
        "```<img src=x onerror=alert(1)>\n<img src=x onerror=alert(1)>\n```",
        "| <img src=x onerror=alert(1)> |\n|-|\n| <b>x</b> |",
    ],
)
def test_nothing_of_the_model_becomes_markup(page: Page, text: str) -> None:
    found = page.evaluate(
        """async (text) => {
          const { Markdown } = await import("/static/markdown.js");
          const root = document.createElement("div");
          new Markdown(root).set(text);
          const all = [...root.querySelectorAll("*")];
          const attributes = all.flatMap((e) => [...e.attributes]).map((a) => `${a.name}=${a.value}`);
          return [all.map((e) => e.localName), attributes];
        }""",
        text,
    )
    names, attributes = found
    assert set(names) <= {"p", "code", "pre", "div", "span", "button", "table", "thead", "tbody", "tr", "th", "td", "a"}
    assert not [one for one in attributes if one.startswith("on")]
    assert all(one.startswith(("href=http://", "href=https://")) for one in attributes if one.startswith("href"))


SAMPLE = """# Title
Some *emphasis*, **strong _and_ more**, `code` and a [link](https://e.org/a_(b)).

1. one
   - two
   - three

     with a paragraph
2. four

| a | b |
|---|--:|
| 1 | `2` |

```python
def f():
    return "**no**"
```

> quoted
> - list

The end: https://e.org.
"""


def test_growing_ends_where_showing_at_once_does(page: Page) -> None:
    whole = render(page, SAMPLE)
    assert render(page, SAMPLE, list(range(len(SAMPLE)))) == whole
    assert render(page, SAMPLE, list(range(0, len(SAMPLE), 7))) == whole


@pytest.mark.parametrize(
    ("text", "markup"),
    [
        ("so **bold", "<p>so <strong>bold</strong></p>"),
        ("so **", "<p>so </p>"),
        ("so `co", "<p>so <code>co</code></p>"),
        ("so [a](https://e", "<p>so a</p>"),
        ("2 * 3", "<p>2 * 3</p>"),
        ("**a *b", "<p><strong>a <em>b</em></strong></p>"),
    ],
)
def test_what_is_begun_is_shown_as_if_it_were_closed(page: Page, text: str, markup: str) -> None:
    script = """async (text) => {
      const { Markdown } = await import("/static/markdown.js");
      const root = document.createElement("div");
      new Markdown(root).set(text, true);
      return root.innerHTML;
    }"""
    assert page.evaluate(script, text) == markup


def test_blocks_that_are_done_stay_the_same_nodes(page: Page) -> None:
    script = """async () => {
      const { Markdown } = await import("/static/markdown.js");
      const root = document.createElement("div");
      const markdown = new Markdown(root);
      markdown.set("one\\n\\n```\\na", true);
      const [paragraph, code] = root.children;
      markdown.set("one\\n\\n```\\nab\\n```\\n\\nlast", true);
      return [paragraph === root.children[0], code === root.children[1], root.children.length];
    }"""
    assert page.evaluate(script) == [True, True, 3]


@pytest.mark.parametrize(
    "text",
    [
        *("*" * 40_000, "*a" * 20_000, "**a _b " * 8_000, "[" * 40_000, "[](" * 15_000, "](" * 20_000, "`" * 40_000),
        *("`a``b" * 10_000, "> " * 20_000, "- " * 20_000, "> - " * 5_000 + "x", "#" + " " * 40_000 + "x", "|" * 40_000),
        *("a|b\n" * 10_000, "- a\n" * 10_000, "  " * 20_000 + "- x", "-" + " " * 40_000 + "|x\n-" + " " * 40_000 + "x"),
        *("<" * 40_000, "https://" * 5_000, "~~" * 20_000, "\\" * 40_000, "```" + " " * 40_000 + "`", "_a_" * 15_000),
        "\n".join(" " * (2 * depth) + "- x" for depth in range(150)),
    ],
    ids=lambda text: json.dumps(text[:12]),
)
def test_no_text_keeps_the_page_busy(page: Page, text: str) -> None:
    began = time.monotonic()
    render(page, text)
    assert time.monotonic() - began < 3
