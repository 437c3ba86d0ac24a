"""A question asked in other words: what followed is kept as an earlier version."""

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from .conftest import Complaints, opened
from .fake_server import FakeServer


def finished(page: Page) -> None:
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def say(page: Page, text: str) -> None:
    page.get_by_role("textbox", name="Your message").fill(text)
    page.get_by_role("textbox", name="Your message").press("Enter")
    finished(page)


def field(page: Page) -> Locator:
    return page.get_by_role("textbox", name="The question in other words")


def edit(page: Page, question: int, text: str) -> None:
    page.get_by_role("button", name="Edit the question").nth(question).click()
    expect(field(page)).to_be_focused()
    field(page).fill(text)
    page.get_by_role("button", name="Ask this").click()
    finished(page)


def questions(page: Page) -> list[str]:
    return page.locator(".question-text").all_inner_texts()


def later(page: Page) -> Locator:
    return page.get_by_role("button", name="Later version")


@pytest.fixture
def asked(page: Page) -> Page:
    for text in ("one", "two", "three"):
        say(page, text)
    return page


def test_conversation_goes_on_from_the_edited_question(asked: Page, server: FakeServer) -> None:
    edit(asked, 1, "two, better")
    assert questions(asked) == ["one", "two, better"]
    expect(asked.locator(".answer").last).to_contain_text("You said two, better.")
    assert [message["content"] for message in server.requests[-1]["messages"]] == [
        *("one", "You said **one**.", "two, better")
    ]
    expect(asked.get_by_role("textbox", name="Your message")).to_be_focused()
    say(asked, "four")
    assert questions(asked) == ["one", "two, better", "four"]


def test_earlier_versions_are_kept_with_what_followed(asked: Page) -> None:
    edit(asked, 1, "two, better")
    edit(asked, 1, "two, best")
    versions = asked.get_by_role("group", name="Versions of the question")
    expect(versions).to_have_text("3 of 3")
    asked.reload()
    later(asked).click()  # goes round
    expect(versions).to_have_text("1 of 3")
    expect(asked.get_by_role("status")).to_have_text("Version 1 of 3")
    assert questions(asked) == ["one", "two", "three"]
    expect(asked.locator(".answer").last).to_contain_text("You said three.")
    expect(later(asked)).to_be_focused()
    asked.keyboard.press("Enter")
    expect(versions).to_have_text("2 of 3")
    assert questions(asked) == ["one", "two, better"]
    asked.reload()
    expect(versions).to_have_text("2 of 3")
    asked.get_by_role("button", name="Earlier version").click()
    assert questions(asked) == ["one", "two", "three"]


def test_versions_within_versions(asked: Page) -> None:
    edit(asked, 1, "two, better")  # under the first "one"
    edit(asked, 0, "One")
    assert questions(asked) == ["One"]
    expect(asked.get_by_role("navigation").get_by_role("listitem")).to_have_text(["One"])  # its title is what it asks
    later(asked).click()
    assert questions(asked) == ["one", "two, better"]
    later(asked).nth(1).click()
    assert questions(asked) == ["one", "two", "three"]
    expect(asked.get_by_role("group", name="Versions of the question")).to_have_text(["1 of 2", "1 of 2"])


def test_keyboard_edits_and_cancels(page: Page, server: FakeServer) -> None:
    say(page, "hello")
    pencil = page.get_by_role("button", name="Edit the question")
    pencil.focus()
    expect(pencil).to_have_css("opacity", "1")
    page.keyboard.press("Enter")
    expect(field(page)).to_have_value("hello")
    page.keyboard.type(", world")
    page.keyboard.press("Escape")
    expect(field(page)).to_be_hidden()
    expect(pencil).to_be_focused()
    assert questions(page) == ["hello"]
    page.keyboard.press("Enter")
    expect(field(page)).to_have_value("hello")  # what was cancelled is gone
    page.keyboard.type(",")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("world")
    page.keyboard.press("Enter")
    finished(page)
    assert questions(page) == ["hello,\nworld"]
    assert len(server.requests) == 2


def test_nothing_empty_and_nothing_wrong_is_asked(page: Page, server: FakeServer) -> None:
    say(page, "hello")
    page.get_by_role("button", name="Edit the question").click()
    field(page).fill("  ")
    field(page).press("Enter")
    expect(field(page)).to_be_visible()
    field(page).fill("again")
    page.get_by_role("spinbutton", name="Top-p").fill("7")
    field(page).press("Enter")
    expect(page.get_by_text("Top-p must be")).to_be_visible()
    expect(field(page)).to_have_value("again")
    assert len(server.requests) == 1


def test_no_edit_during_an_answer(page: Page) -> None:
    page.get_by_role("textbox", name="Your message").fill("slow")
    page.keyboard.press("Enter")
    expect(page.locator(".answer")).to_contain_text("It goes on")
    expect(page.get_by_role("button", name="Edit the question")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Edit the question")).to_be_visible()


def test_pencil_is_seen_where_nothing_hovers(browser: Browser, server: FakeServer, complaints: Complaints) -> None:
    with opened(browser, server.url, complaints, has_touch=True, is_mobile=True) as page:
        say(page, "hello")
        expect(page.get_by_role("button", name="Edit the question")).to_have_css("opacity", "1")


def test_full_storage_drops_probabilities_of_earlier_versions(page: Page) -> None:
    page.locator("#glass-toggle").click()
    say(page, "an old one")
    edit(page, 0, "an old one, again")
    kept = """() => Object.entries(localStorage).filter(([key]) => key.includes('conversation'))
        .reduce((count, [, text]) => count + (text.match(/logprob/g) ?? []).length, 0)"""
    assert page.evaluate(kept) > 10
    page.locator("#glass-toggle").click()
    page.evaluate(
        """() => {
          let size = 1 << 22;
          for (let i = 0; size > 64; i++) {
            try { localStorage.setItem('filler' + i, 'x'.repeat(size)); } catch { size >>= 1; }
          }
        }"""
    )
    page.get_by_role("button", name="New conversation").click()
    say(page, "a new one")
    page.reload()
    expect(page.locator(".answer")).to_contain_text("You said a new one.")
    page.get_by_role("button", name="an old one, again", exact=True).click()
    later(page).click()
    page.locator("#glass-toggle").click()
    expect(page.locator(".answer")).to_contain_text("no probabilities")
    assert page.evaluate(kept) == 0
