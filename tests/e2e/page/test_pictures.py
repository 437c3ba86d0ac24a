"""Pictures of the page, for docs/page.md: ``JLLM_PAGE_PICTURES=docs/images pytest tests/e2e/page/test_pictures.py``.

Without the variable they are taken as well, and thrown away.
"""

import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from .conftest import Complaints, opened
from .fake_server import FakeServer, Piece, timeline_row, token, words

LARGEST = 150_000  # bytes
QUESTION = "Why is the sky blue?"
ANSWER = """\
Because air scatters short waves of light more than long ones. This is called **Rayleigh scattering**.

1. Sunlight holds *all* colours, from red to violet.
2. The molecules of air are much smaller than a wave of light:
   - blue waves are short, and are scattered most;
   - red waves are long, and mostly pass.

| Colour | Wavelength | Scattered |
|--------|-----------:|----------:|
| Blue   | 450 nm     | 5.9       |
| Red    | 700 nm     | 1.0       |

```python
def scattered(nanometres, reference=700):
    return (reference / nanometres) ** 4
```
"""
SPOKEN = (
    "The light of the evening sun takes a longer way through the air. Most of its blue has been scattered out of it "
    "before it reaches us, and what is left is orange and red. Dust and smoke make the colours deeper \N{SUNRISE}"
)
OTHERS = (" sky", " air", " long", " most", " light", " colours", " red", " sun", " way", " dust")


def likely(text: str) -> list[Piece]:
    """A text with probabilities as they could be, at a speed that could be."""
    draw = random.Random(4)
    pieces = []
    for piece in words(text):
        share = min(0.999, max(0.02, draw.betavariate(1.6, 0.45)))
        rest, others = 1 - share, {}
        for name in draw.sample([other for other in OTHERS if other != piece.text], 9):
            others[name] = max(1e-6, rest * draw.uniform(0.2, 0.6))
            rest -= others[name]
        pieces.append(Piece(piece.text, tokens=(token(piece.text, share, **others),), wait=0.02))
    return pieces


def a_minute(page: Page, server: FakeServer, url: str) -> None:
    """Open the page, and let the engine work for a minute in no time."""
    page.clock.install()
    page.goto(url)
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    for second in range(50):
        load = 0.5 + 0.3 * math.sin(second / 7) + 0.15 * math.sin(second / 2.3)
        running = max(1, round(16 * load))
        server.stats.update(running=running, tokens_per_second=round(120 * load + 9 * math.sin(second), 1))
        server.stats.update(pages_in_use=24 * running, waiting=max(0, running - 12))
        with page.expect_response("**/stats"):
            page.clock.run_for(1000)
    page.clock.resume()


def last_seconds(rows: int = 4, seconds: float = 30.0) -> dict[str, Any]:
    """A timeline of continuous batching as it could be: ``rows`` answers run at a time, and others wait."""
    draw = random.Random(7)
    free_at, shown = [0.0] * rows, []
    for number in range(1, 18):
        arrived = 1.7 * number - 3
        row = free_at.index(min(free_at))
        start = max(arrived, free_at[row])
        first, end = start + draw.uniform(0.3, 2.2), start + draw.uniform(4, 12)
        free_at[row] = end
        marks = (("waiting", arrived, start), ("prefill", start, first), ("decode", first, end))
        phases = [(name, seconds - a, max(0.0, seconds - b)) for name, a, b in marks if a < seconds and b > 0]
        if phases:
            shown.append(timeline_row(number, *phases, ended="stop" if end < seconds else None))
    return {"seconds": seconds, "rows": shown, "left_out": 0}


def say(page: Page, text: str) -> None:
    page.get_by_role("textbox", name="Your message").fill(text)
    page.get_by_role("textbox", name="Your message").press("Enter")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    expect(page.locator(".answer").last).to_contain_text("tokens")


@pytest.mark.parametrize(
    ("name", "scheme", "width", "height"),
    [("chat", "light", 1300, 740), ("glass", "dark", 1300, 700), ("narrow", "light", 360, 720)],
)
def test_picture(
    browser: Browser, server: FakeServer, tmp_path: Path, name: str, scheme: str, width: int, height: int
) -> None:
    folder = Path(os.environ.get("JLLM_PAGE_PICTURES") or tmp_path)
    server.models = ["SmolLM2-135M-Instruct"]
    server.timeline = last_seconds()
    server.answer = lambda said: likely(ANSWER if said == QUESTION else SPOKEN)
    viewport = {"width": width, "height": height}
    with opened(browser, "about:blank", Complaints(), viewport=viewport, color_scheme=scheme) as page:
        if width > 1000:
            a_minute(page, server, server.url)
        else:
            page.goto(server.url)
        if name == "chat":
            say(page, QUESTION)
        else:
            page.locator("#glass-toggle").click()
            say(page, "And in the evening?")
            page.locator(".glass-text .level-3").first.click()
            expect(page.locator("#inspector")).to_be_visible()
        page.evaluate("document.fonts.ready")
        path = folder / f"page-{name}.png"
        page.screenshot(path=path)
    assert 5_000 < path.stat().st_size < LARGEST


def test_picture_of_the_timeline(browser: Browser, server: FakeServer, tmp_path: Path) -> None:
    path = Path(os.environ.get("JLLM_PAGE_PICTURES") or tmp_path) / "page-timeline.png"
    server.timeline = last_seconds()
    # Twice as sharp, for it is small.
    with opened(browser, server.url, Complaints(), device_scale_factor=2) as page:
        sequences = page.get_by_role("region", name="Sequences")
        expect(sequences).to_contain_text("the last 30 s")
        sequences.screenshot(path=path)
    assert 5_000 < path.stat().st_size < LARGEST
