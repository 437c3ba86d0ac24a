"""The engine's figures at the side of the page."""

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from .conftest import Complaints, opened
from .fake_server import FakeServer


def test_figures(page: Page) -> None:
    engine = page.get_by_role("region", name="Engine")
    expect(engine).to_contain_text("live")
    for text in (
        *("Batch3 of 16", "1 waiting", "Pages96 of 512 in use", "41 idle", "Prefix hits62 %"),
        *("5,034 of 8,120 prompt tokens reused", "Tokens a second84.3", "12,345 since the start"),
        "40 finished, 2 cancelled, 1 failed, 1 preempted",
    ):
        expect(engine).to_contain_text(text)
    slots = engine.locator(".figure-bar").first.locator("span")
    assert slots.evaluate_all("all => all.map((e) => e.className)") == ["used"] * 3 + ["free"] * 13


def test_figures_follow(page: Page, server: FakeServer) -> None:
    engine = page.get_by_role("region", name="Engine")
    expect(engine).to_contain_text("3 of 16")
    server.stats.update(running=9, prompt_tokens=0, reused_tokens=0, tokens_per_second=240.4)
    expect(engine).to_contain_text("9 of 16")
    expect(engine).to_contain_text("Tokens a second240")
    expect(engine).to_contain_text("no prompts yet")
    steps = "e => (e.querySelector('.chart-line').getAttribute('d').match(/V/g) ?? []).length"
    assert engine.locator(".figure-chart").first.evaluate(steps) >= 2


def test_away_and_back(page: Page, complaints: Complaints) -> None:
    complaints.expected = ("Failed to load resource",)
    engine = page.get_by_role("region", name="Engine")
    expect(engine).to_contain_text("live")
    page.route("**/stats", lambda route: route.abort())
    expect(engine).to_contain_text("no answer from the server")
    expect(page.get_by_role("status")).to_have_text("The server does not answer.")
    expect(engine).to_contain_text("3 of 16")  # the last figures stay
    page.unroute("**/stats")
    expect(engine).to_contain_text("live")
    expect(page.get_by_role("status")).to_have_text("The server is back.")


def test_server_that_comes_after_the_page(page: Page, complaints: Complaints) -> None:
    complaints.expected = ("Failed to load resource",)
    page.route("**/v1/models", lambda route: route.abort())
    page.route("**/stats", lambda route: route.abort())
    page.reload()
    expect(page.get_by_label("Model", exact=True)).to_have_text("no server")
    page.unroute("**/v1/models")
    page.unroute("**/stats")
    expect(page.get_by_label("Model", exact=True)).to_have_value("tiny-model")


def test_nobody_looks_nobody_asks(page: Page, server: FakeServer) -> None:
    expect(page.get_by_role("region", name="Engine")).to_contain_text("live")
    page.get_by_role("button", name="Engine and parameters").click()
    expect(page.get_by_role("region", name="Engine")).to_be_hidden()
    page.wait_for_timeout(1500)  # one may have been under way
    looks = server.looks
    page.wait_for_timeout(2500)
    assert server.looks == looks
    page.get_by_role("button", name="Engine and parameters").click()
    expect(page.get_by_role("region", name="Engine")).to_contain_text("live")
    page.wait_for_timeout(1500)
    assert looks < server.looks <= looks + 3  # once a second


def test_timeline(page: Page, server: FakeServer) -> None:
    picture = page.get_by_role("img", name="Timeline")
    expect(picture).to_have_attribute(
        "aria-label",
        "Timeline of the last 30 seconds: 6 sequences, of which 1 finished, 1 decode, 1 prefill, 1 waiting. "
        "The table has each of them.",
    )
    kinds = picture.locator("rect").evaluate_all("all => all.map((e) => e.getAttribute('class'))")
    assert kinds == [
        *("waiting", "prefill", "decode"),
        "decode",
        *("waiting", "prefill", "decode", "preempted", "prefill"),
        "waiting",
    ]
    # What began before these seconds is drawn from their first moment on, and what goes on up to now.
    box = picture.bounding_box()
    assert box is not None
    longest = picture.locator("rect").nth(3).bounding_box()
    assert longest is not None
    assert abs(longest["x"] - box["x"]) <= 2
    assert abs(longest["width"] - box["width"]) <= 4
    server.timeline["rows"] = []
    server.timeline["left_out"] = 0
    expect(page.get_by_role("region", name="Sequences")).to_contain_text("nothing has run")


def test_timeline_as_a_table_by_keyboard(page: Page) -> None:
    table = page.get_by_role("region", name="Sequences").get_by_role("table")
    expect(table).to_be_hidden()
    page.get_by_text("The same as a table").focus()
    page.keyboard.press("Enter")
    expect(table.get_by_role("row")).to_have_text(
        [
            "No.NowWaitedPrefillDecodeTokens",
            "5finished0.101.4017105 + 50",
            "6decode0.501245106 + 60",
            "7prefill7.005.008.00107 + 70",
            "8waiting3.250.000.00108 + 80",
        ]
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_timeline_is_inside_a_narrow_window(
    browser: Browser, server: FakeServer, complaints: Complaints, scheme: str
) -> None:
    viewport = {"width": 360, "height": 740}
    longest = {"number": 12345, "prompt_tokens": 131072, "generated_tokens": 16384, "ended": "length"}
    server.timeline["rows"] = [row | longest for row in server.timeline["rows"]]
    with opened(browser, server.url, complaints, viewport=viewport, color_scheme=scheme) as page:
        page.get_by_role("button", name="Engine and parameters").click()
        page.get_by_text("The same as a table").click()
        panel = page.get_by_role("complementary")
        expect(panel).to_contain_text("131072 + 16384")
        assert panel.evaluate("e => e.scrollWidth <= e.clientWidth")
        fills = page.locator(".timeline-legend rect").evaluate_all("all => all.map((e) => getComputedStyle(e).fill)")
        assert len(set(fills)) == 4


def test_timeline_that_is_slow_is_asked_for_once_at_a_time(page: Page, server: FakeServer) -> None:
    page.goto("about:blank")  # or the page of before could ask once more
    asked: list[Route] = []
    page.route("**/timeline", lambda route: asked.append(route))  # without an answer
    with page.expect_request("**/timeline"):
        page.goto(server.url)
    for _ in range(3):
        page.wait_for_event("response", lambda response: response.url.endswith("/stats"))
    assert len(asked) == 1
    with page.expect_request("**/timeline"):
        asked[0].fulfill(json=server.timeline)
    expect(page.get_by_role("region", name="Sequences")).to_contain_text("and 2 more")


def test_timeline_that_is_not_told_leaves_the_figures(page: Page, complaints: Complaints) -> None:
    complaints.expected = ("Failed to load resource",)
    page.route("**/timeline", lambda route: route.fulfill(status=500, json={}))
    page.reload()
    expect(page.get_by_role("region", name="Engine")).to_contain_text("3 of 16")
    expect(page.get_by_role("region", name="Sequences")).to_contain_text("nothing has run")
