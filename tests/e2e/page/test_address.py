"""The open conversation in the page's address."""

import re

from playwright.sync_api import Browser, Page, expect

from .conftest import Complaints, opened
from .fake_server import FakeServer


def say(page: Page, text: str) -> None:
    page.get_by_role("textbox", name="Your message").fill(text)
    page.get_by_role("textbox", name="Your message").press("Enter")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def test_address_names_the_open_conversation(page: Page, server: FakeServer) -> None:
    say(page, "the first")
    expect(page).to_have_title("the first · JLLM")
    address = page.url
    assert re.fullmatch(re.escape(server.url) + r"/#/\w{8,}", address)
    page.get_by_role("button", name="New conversation").click()
    assert page.url == f"{server.url}/"
    expect(page).to_have_title("JLLM")
    other = page.context.new_page()  # another tab, where nothing is open
    other.goto(server.url)
    expect(other.locator(".answer")).to_have_count(0)
    other.goto(address)
    expect(other.locator(".answer")).to_contain_text("You said the first.")
    other.close()


def test_back_and_forward(page: Page) -> None:
    say(page, "the first")
    page.get_by_role("button", name="New conversation").click()
    say(page, "the second")
    page.get_by_role("textbox", name="Your message").fill("a draft")
    page.go_back()
    expect(page.locator(".answer")).to_contain_text("You said the first.")
    expect(page.get_by_role("textbox", name="Your message")).to_have_value("")
    page.go_forward()
    expect(page.locator(".answer")).to_contain_text("You said the second.")
    expect(page.get_by_role("textbox", name="Your message")).to_have_value("a draft")


def test_open_conversation_survives_whatever_led_there(page: Page, server: FakeServer) -> None:
    for text in ("the first", "the second"):
        page.get_by_role("button", name="New conversation").click()
        say(page, text)
    page.get_by_role("button", name="the first", exact=True).click()
    page.get_by_role("link", name="Skip to the message box").press("Enter")  # a link within the page
    page.reload()
    expect(page.locator(".answer")).to_contain_text("You said the first.")
    page.goto("about:blank")
    page.goto(server.url)  # the bare address, in the same tab
    expect(page.locator(".answer")).to_contain_text("You said the first.")
    page.get_by_role("button", name="New conversation").click()
    page.reload()
    expect(page.locator(".answer")).to_have_count(0)


def test_address_of_a_conversation_that_is_gone(browser: Browser, server: FakeServer, complaints: Complaints) -> None:
    with opened(browser, f"{server.url}/#/gone", complaints) as page:
        expect(page.get_by_text("Ask, and watch it think.")).to_be_visible()
        assert page.url == f"{server.url}/"
        say(page, "hello")
        expect(page.locator(".answer")).to_contain_text("You said hello.")
