"""The engine's figures at the side of the page."""

from playwright.sync_api import Page, expect

from .conftest import Complaints
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
