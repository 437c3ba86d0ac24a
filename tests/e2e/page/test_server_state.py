"""A server that stops, is gone, and comes back: said above the message box, whatever else is on the page."""

import re

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from .conftest import Complaints, opened
from .fake_server import PUBLISHED, FakeServer

AWAY = "The server does not answer. This page goes on when it is back."


def notice(page: Page) -> Locator:
    return page.locator("#notice")


def announced(page: Page, text: str) -> None:
    expect(page.get_by_role("status")).to_have_text(text)


def gone(page: Page) -> None:
    for path in ("stats", "v1/models", "v1/chat/completions"):
        page.route(f"**/{path}", lambda route: route.abort())


def back(page: Page) -> None:
    for path in ("stats", "v1/models", "v1/chat/completions"):
        page.unroute(f"**/{path}")


@pytest.fixture
def complaints() -> Complaints:
    return Complaints(expected=("Failed to load resource",))


def test_server_stops_and_comes_back(page: Page, server: FakeServer) -> None:
    engine = page.get_by_role("region", name="Engine")
    expect(engine).to_contain_text("live")
    expect(notice(page)).to_be_hidden()
    server.stats["draining"] = {"answers": 1, "seconds_left": 27.6}
    expect(notice(page)).to_have_text("The server is stopping: waiting for 1 answer, at most 28 s.")
    announced(page, "The server is stopping: waiting for 1 answer, at most 28 s.")
    expect(engine).to_contain_text("stopping")
    expect(engine).to_contain_text("3 of 16")  # the figures go on
    expect(engine).to_contain_text("once a second")
    server.stats["draining"] = {"answers": 1200, "seconds_left": 3.0}
    expect(notice(page)).to_have_text("The server is stopping: waiting for 1,200 answers, at most 3 s.")
    announced(page, "The server is stopping: waiting for 1 answer, at most 28 s.")  # the seconds are not read out
    server.stats["draining"] = {"answers": 2, "seconds_left": 0.0}
    expect(notice(page)).to_have_text("The server is stopping, and ends 2 answers.")
    gone(page)
    expect(notice(page)).to_have_text("The server has stopped. This page goes on when it is back.")
    announced(page, "The server has stopped.")
    expect(engine).to_contain_text("stopped")
    server.stats["draining"] = None
    server.models = ["another-model"]
    back(page)
    expect(notice(page)).to_be_hidden()
    announced(page, "The server is back.")
    expect(page.get_by_label("Model", exact=True)).to_have_value("another-model")
    expect(page.get_by_role("spinbutton", name="Temperature")).to_have_attribute("placeholder", "greedy")


def test_nothing_is_waited_for(page: Page, server: FakeServer) -> None:
    server.stats["draining"] = {"answers": 0, "seconds_left": 30.0}
    expect(notice(page)).to_have_text("The server is stopping.")


def test_narrow_page_notices_once_it_asks(browser: Browser, server: FakeServer, complaints: Complaints) -> None:
    with opened(browser, server.url, complaints, viewport={"width": 360, "height": 700}) as page:
        expect(page.get_by_label("Model", exact=True)).to_have_value("tiny-model")
        gone(page)
        page.get_by_role("textbox", name="Your message").fill("anyone?")
        page.keyboard.press("Enter")
        expect(notice(page)).to_have_text(AWAY)
        back(page)
        expect(notice(page)).to_be_hidden()
        page.get_by_role("button", name="Try again").click()
        expect(page.locator(".answer")).to_contain_text("You said anyone?")
        expect(page.locator(".answer")).to_contain_text("tokens")
        page.wait_for_timeout(1500)  # one look may have been under way
        looks = server.looks
        page.wait_for_timeout(2500)
        assert server.looks == looks  # all is well again, and nobody looks


def test_narrow_page_sees_the_end_while_it_waits(browser: Browser, server: FakeServer, complaints: Complaints) -> None:
    with opened(browser, server.url, complaints, viewport={"width": 360, "height": 700}) as page:
        page.get_by_role("textbox", name="Your message").fill("slow")
        page.keyboard.press("Enter")
        expect(page.locator(".answer")).to_contain_text("It goes on")
        server.stats["draining"] = {"answers": 1, "seconds_left": 30.0}
        expect(notice(page)).to_contain_text("waiting for 1 answer, at most 30 s")


@pytest.mark.parametrize("status", [502, 503, 504])
def test_proxy_before_a_server_that_is_gone(page: Page, status: int) -> None:
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    page.route("**/stats", lambda route: route.fulfill(status=status, body="<html>Bad Gateway</html>"))
    expect(notice(page)).to_have_text(AWAY)


def test_server_without_figures_is_no_server_that_is_gone(page: Page) -> None:
    engine = page.get_by_role("region", name="Engine")
    expect(engine).to_contain_text("live")
    page.route("**/stats", lambda route: route.fulfill(status=500, json={}))
    expect(engine).to_contain_text("no figures (500)")
    expect(engine).to_have_class(re.compile("stale"))
    expect(notice(page)).to_be_hidden()


def test_another_model_behind_the_same_address(browser: Browser, server: FakeServer, complaints: Complaints) -> None:
    # Nobody looked while the server was started anew: the first question finds out.
    def refuse(route: Route) -> None:
        error = {"error": {"message": "there is no model 'tiny-model', this server has another-model"}}
        route.fulfill(status=404, json=error) if "tiny-model" in (route.request.post_data or "") else route.continue_()

    with opened(browser, server.url, complaints, viewport={"width": 360, "height": 700}) as page:
        expect(page.get_by_label("Model", exact=True)).to_have_value("tiny-model")
        server.models = ["another-model"]
        page.route("**/v1/chat/completions", refuse)
        page.get_by_role("textbox", name="Your message").fill("hello")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("this server has another-model")
        page.get_by_role("button", name="Try again").click()
        expect(page.locator(".answer")).to_contain_text("You said hello.")
        assert server.requests[-1]["model"] == "another-model"


def test_figures_of_the_past_are_dimmed_with_their_time(page: Page) -> None:
    engine = page.get_by_role("region", name="Engine")
    value = engine.locator(".figure-value").first
    expect(engine).to_contain_text("once a second")
    colour = "e => getComputedStyle(e).color"
    live = value.evaluate(colour)
    page.route("**/stats", lambda route: route.abort())
    expect(engine).to_contain_text(re.compile(r"as they were at \d\d:\d\d:\d\d"))
    assert value.evaluate(colour) != live
    expect(engine).to_contain_text("3 of 16")
    page.unroute("**/stats")
    expect(engine).to_contain_text("once a second")
    assert value.evaluate(colour) == live


def test_figures_that_were_not_looked_at_are_dimmed_until_they_are_new(page: Page) -> None:
    engine = page.get_by_role("region", name="Engine")
    expect(engine).to_contain_text("once a second")
    page.get_by_role("button", name="Engine and parameters").click()
    expect(engine).to_be_hidden()
    page.wait_for_timeout(1500)  # the look that is under way
    requests: list[Route] = []
    page.route("**/stats", lambda route: requests.append(route))  # asked, and not answered yet
    page.get_by_role("button", name="Engine and parameters").click()
    expect(engine).to_contain_text("as they were at")
    page.wait_for_timeout(200)
    requests[0].continue_()
    expect(engine).to_contain_text("once a second")
    page.unroute("**/stats")


def test_rate_of_answers_that_have_ended_is_dimmed(page: Page, server: FakeServer) -> None:
    engine = page.get_by_role("region", name="Engine")
    rate = engine.locator(".figure").filter(has_text="Tokens a second")
    expect(rate).to_contain_text("84.3")
    expect(rate).not_to_have_class(re.compile("stale"))
    server.stats.update(running=0, waiting=0)
    expect(rate).to_contain_text(re.compile(r"idle since \d\d:\d\d:\d\d"))
    expect(rate).to_have_class(re.compile("stale"))
    server.stats.update(running=1)
    expect(rate).not_to_contain_text("idle")
    expect(rate).not_to_have_class(re.compile("stale"))


def test_defaults_of_the_model_are_in_the_empty_fields(page: Page, server: FakeServer) -> None:
    server.models = ["tiny-model", "other-model"]
    server.defaults["tiny-model"] = {**PUBLISHED, "max_tokens_without_thinking": 512, "presence_penalty": 1.5}
    page.reload()

    def shown() -> list[str | None]:
        names = ("Temperature", "Top-p", "Top-k", "Min-p", "Repetition penalty", "Max tokens", "Seed")
        fields = [page.get_by_role("spinbutton", name=name) for name in names]
        assert [field.input_value() for field in fields] == [""] * len(fields)
        return [field.get_attribute("placeholder") for field in fields]

    note = page.get_by_text("An empty field has")
    expect(note).to_have_text(
        "An empty field has the setting of the model\N{RIGHT SINGLE QUOTATION MARK}s publisher, presence penalty 1.5."
    )
    assert shown() == ["0.6", "0.95", "20", "off", "off", "16384", "random"]
    page.get_by_text("Off", exact=True).click()
    assert shown()[5] == "512"  # of an answer without thinking
    page.get_by_label("Model", exact=True).select_option("other-model")
    expect(note).to_have_text("An empty field has the server\N{RIGHT SINGLE QUOTATION MARK}s default.")
    assert shown() == ["greedy", "off", "off", "off", "off", "2048", "random"]
    page.get_by_role("textbox", name="Your message").fill("hello")
    page.keyboard.press("Enter")
    expect(page.locator(".answer")).to_contain_text("tokens")
    assert set(server.requests[0]) == {"model", "messages", "stream", "stream_options", "authorization"}
