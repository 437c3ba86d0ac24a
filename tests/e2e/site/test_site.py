"""The site: built without a warning, every link followed, read from disk in a browser that reaches no other machine."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

ROOT = Path(__file__).parents[3]
NARROW = {"width": 360, "height": 740}
DARK_BELOW, LIGHT_ABOVE = 60, 200  # of 255


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `hatch run docs` builds it, elsewhere."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "WARNING" not in done.stderr
    return folder


class References(HTMLParser):
    """What a page points at, and the places in it that can be pointed at."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.ids.add(str(given["id"]))
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        elif tag == "link" and given.get("rel") in {"stylesheet", "icon", "preconnect", "preload"}:
            self.loaded.append(str(given["href"]))
        elif given.get("src"):
            self.loaded.append(str(given["src"]))


def pages(site: Path) -> dict[Path, References]:
    found = {path: References(path.read_text("utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(found) > 50
    return found


def lead_nowhere(site: Path, known: dict[Path, References]) -> list[str]:
    """The links and files of pages that are not there."""
    lost = []
    for path, page in known.items():
        for target in (*page.links, *page.loaded):
            parts = urlsplit(target)
            if parts.scheme:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = there / "index.html" if there.is_dir() else there
            anchor = unquote(parts.fragment)
            if not there.exists() or (anchor and there in known and anchor not in known[there].ids | {"__top"}):
                lost.append(f"{path.relative_to(site)}: {target}")
    return lost


def test_every_link_and_file_of_a_page_is_there(site: Path) -> None:
    known = pages(site)
    assert lead_nowhere(site, known) == []
    # The check itself.
    some = known[site / "index.html"]
    some.links += ["none.html", "install.html#none", "images/none.png"]
    assert len(lead_nowhere(site, known)) == 3


def test_nothing_of_a_page_comes_from_another_server(site: Path) -> None:
    loaded = [target for page in pages(site).values() for target in page.loaded]
    assert loaded
    assert [target for target in loaded if re.match(r"(https?:)?//", target)] == []


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport=NARROW, color_scheme="dark")
    context.set_default_timeout(20_000)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page that must ask no other machine for anything, and complain about nothing."""
    asked: list[str] = []
    complaints: list[str] = []
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    page.close()
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
    assert complaints == []


def test_every_page_fits_a_telephone(site: Path, page: Page) -> None:
    wide = []
    for path in pages(site):
        page.goto(path.as_uri())
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > NARROW["width"]:
            wide.append(f"{path.relative_to(site)}: {width}")
    assert wide == []


@pytest.mark.parametrize("words", ["KV cache", "GQA", "paged"])
def test_search_finds_what_people_look_for(site: Path, page: Page, words: str) -> None:
    page.goto((site / "index.html").as_uri())
    page.set_viewport_size({"width": 1280, "height": 800})
    box = page.get_by_role("textbox", name="Search")
    box.click()
    page.get_by_text("Type to start searching").wait_for()  # what is typed before is not looked up
    box.press_sequentially(words)
    first = page.locator(".md-search-result__item").first
    first.wait_for()
    assert words.lower() in first.inner_text().lower()
    first.locator("a").first.click()
    page.wait_for_url(re.compile(r"\.html"))
    assert words.lower().split()[0] in page.locator("article").inner_text().lower()


def lightness(page: Page) -> float:
    """How light the ground of a page is, from 0 to 255."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


def test_pages_are_dark_where_the_system_is(site: Path, page: Page) -> None:
    page.goto((site / "guides" / "run.html").as_uri())
    assert lightness(page) < DARK_BELOW
    page.emulate_media(color_scheme="light")
    page.reload()
    assert lightness(page) > LIGHT_ABOVE
