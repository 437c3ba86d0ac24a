"""A conversation in the browser: what is sent, what is shown, and what stays."""

import re

import pytest
from playwright.sync_api import Locator, Page, expect

from .conftest import Complaints
from .fake_server import FakeServer


def prompt(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Your message")


def say(page: Page, text: str) -> None:
    prompt(page).fill(text)
    prompt(page).press("Enter")


def answers(page: Page) -> Locator:
    return page.locator(".answer")


def finished(page: Page) -> None:
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def test_answer_streams_as_markdown(page: Page, server: FakeServer) -> None:
    say(page, "a\nb")
    expect(answers(page)).to_contain_text("You said a")
    expect(answers(page).locator("strong")).to_have_text("a\nb", use_inner_text=True)
    finished(page)
    expect(answers(page)).to_contain_text("4 tokens")
    (request,) = server.requests
    assert request["messages"] == [{"role": "user", "content": "a\nb"}]
    assert request["model"] == "tiny-model"
    assert request["stream"] is True
    assert request["stream_options"] == {"include_usage": True}
    assert "logprobs" not in request  # they cost time: only the glass box asks for them
    assert "temperature" not in request


def test_words_are_shown_as_they_come(page: Page) -> None:
    say(page, "slow")
    expect(answers(page)).to_contain_text("It goes on and on")
    expect(answers(page)).to_contain_text("Answering…")
    seen = len(answers(page).locator(".prose").inner_text())
    page.wait_for_timeout(600)
    assert len(answers(page).locator(".prose").inner_text()) > seen


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stop(page: Page, server: FakeServer, how: str) -> None:
    say(page, "slow")
    expect(answers(page)).to_contain_text("It goes on")
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop", exact=True).click()
    expect(answers(page)).to_contain_text("stopped")
    assert server.stopped.wait(10), "the server went on"
    text = answers(page).locator(".prose").inner_text()
    page.reload()
    expect(answers(page).locator(".prose")).to_have_text(text)
    say(page, "more")
    finished(page)
    assert [message["role"] for message in server.requests[-1]["messages"]] == ["user", "assistant", "user"]


def test_regenerate_replaces_the_answer(page: Page, server: FakeServer) -> None:
    say(page, "first")
    finished(page)
    say(page, "second")
    finished(page)
    expect(page.get_by_role("button", name="Regenerate")).to_have_count(1)  # of the last answer
    page.get_by_role("button", name="Regenerate").click()
    expect(prompt(page)).to_be_focused()
    expect(answers(page)).to_have_count(2)
    finished(page)
    assert server.requests[2]["messages"] == server.requests[1]["messages"]
    page.reload()
    expect(answers(page)).to_have_count(2)


def test_refusal_is_shown_and_can_be_tried_again(page: Page, complaints: Complaints) -> None:
    complaints.expected = ("400",)  # the browser's own line
    say(page, "refuse")
    expect(page.get_by_role("alert")).to_contain_text("The server refused (400)")
    expect(page.get_by_role("alert")).to_contain_text("max_tokens must be a whole number")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_have_count(1)
    finished(page)


def test_error_in_the_stream_keeps_what_has_come(page: Page, server: FakeServer) -> None:
    say(page, "fail")
    expect(page.get_by_role("alert")).to_contain_text("The step ran out of memory.")
    expect(answers(page).locator(".prose")).to_have_text("It begins well")
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("The step ran out of memory.")


def test_end_before_the_end_is_an_error(page: Page) -> None:
    say(page, "cut")
    expect(page.get_by_role("alert")).to_contain_text("ended the connection before the answer was complete")


def test_no_server_is_said(page: Page, complaints: Complaints) -> None:
    complaints.expected = ("Failed to load resource",)
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, "anyone?")
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_contain_text("You said anyone?")


def test_thinking_is_folded(page: Page, server: FakeServer) -> None:
    page.get_by_text("Off", exact=True).click()
    say(page, "think")
    finished(page)
    assert server.requests[0]["chat_template_kwargs"] == {"enable_thinking": False}
    expect(answers(page)).to_contain_text("It is so.")
    expect(page.get_by_text("Let me see")).to_be_hidden()
    page.get_by_text(re.compile("Thought")).click()
    expect(page.locator(".thoughts-text em")).to_have_text("see")
    say(page, "more")
    finished(page)
    assert server.requests[1]["messages"][1]["content"] == "It is so."  # thoughts are not sent back
    page.reload()
    expect(page.get_by_text("Let me see")).to_be_hidden()


def test_parameters_are_sent_and_kept(page: Page, server: FakeServer) -> None:
    values = {"Temperature": "0.75", "Top-p": "0.9", "Top-k": "40", "Min-p": "0.05", "Max tokens": "12", "Seed": "7"}
    values["Repetition penalty"] = "1.15"
    for name, value in values.items():
        page.get_by_role("spinbutton", name=name).fill(value)
    page.get_by_role("textbox", name="System message").fill("Be brief.")
    page.get_by_text("On", exact=True).click()
    page.reload()
    say(page, "hello")
    finished(page)
    expected = {"temperature": 0.75, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 12, "seed": 7}
    expected["repetition_penalty"] = 1.15
    assert {name: server.requests[0][name] for name in expected} == expected
    assert server.requests[0]["chat_template_kwargs"] == {"enable_thinking": True}
    assert server.requests[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    page.get_by_role("button", name="Reset").click()
    say(page, "again")
    finished(page)
    assert not set(expected) & set(server.requests[1])
    assert [message["role"] for message in server.requests[1]["messages"]] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("Top-p", "0"), ("Top-p", "1.5"), ("Top-k", "1.5"), ("Max tokens", "0"), ("Repetition penalty", "0")],
)
def test_wrong_parameter_is_told_and_nothing_is_sent(page: Page, server: FakeServer, name: str, value: str) -> None:
    field = page.get_by_role("spinbutton", name=name)
    field.fill(value)
    say(page, "hello")
    expect(page.get_by_text(f"{name} must be")).to_be_visible()
    expect(field).to_be_focused()
    expect(prompt(page)).to_have_value("hello")
    assert server.requests == []
    field.fill("")
    prompt(page).press("Enter")
    finished(page)
    assert len(server.requests) == 1


def test_history_survives_a_reload(page: Page) -> None:
    say(page, "the first")
    finished(page)
    page.get_by_role("button", name="New conversation").click()
    expect(answers(page)).to_have_count(0)
    say(page, "the second")
    finished(page)
    page.reload()
    expect(answers(page)).to_contain_text("You said the second.")
    conversations = page.get_by_role("navigation", name="Conversations").get_by_role("listitem")
    expect(conversations).to_have_text(["the second", "the first"])
    page.get_by_role("button", name="the first", exact=True).click()
    expect(answers(page)).to_contain_text("You said the first.")
    expect(page.get_by_role("button", name="the first", exact=True)).to_have_attribute("aria-current", "true")


def test_answer_survives_a_reload_halfway(page: Page) -> None:
    say(page, "slow")
    expect(answers(page)).to_contain_text("word by word")
    page.reload()
    expect(answers(page)).to_contain_text("word by word")
    expect(answers(page)).to_contain_text("stopped")


def test_answer_goes_on_while_another_conversation_is_read(page: Page) -> None:
    say(page, "slow one")
    expect(answers(page)).to_contain_text("It goes on")
    page.get_by_role("button", name="New conversation").click()
    say(page, "quick one")
    finished(page)
    expect(answers(page)).to_contain_text("You said quick one.")
    page.get_by_role("button", name="slow one …", exact=True).click()  # the dots say that it goes on
    expect(answers(page)).to_contain_text("Answering…")
    seen = len(answers(page).locator(".prose").inner_text())
    page.wait_for_timeout(500)
    assert len(answers(page).locator(".prose").inner_text()) > seen


def test_conversations_can_be_deleted(page: Page, server: FakeServer) -> None:
    for text in ("the first", "the second", "slow"):
        page.get_by_role("button", name="New conversation").click()
        say(page, text)
        expect(answers(page)).to_have_count(1)
    page.get_by_role("button", name="Delete “slow”").click()
    page.get_by_role("button", name="Cancel").click()
    expect(answers(page)).to_have_count(1)
    page.get_by_role("button", name="Delete “slow”").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(answers(page)).to_have_count(0)
    assert server.stopped.wait(10), "the answer went on for nobody"
    expect(page.get_by_role("navigation").get_by_role("listitem")).to_have_text(["the second", "the first"])
    page.get_by_role("button", name="Clear all").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("navigation").get_by_role("listitem")).to_have_count(0)
    page.reload()
    expect(page.get_by_text("Ask, and watch it think.")).to_be_visible()
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.includes('conversation'))") == []


def test_key_is_asked_for(page: Page, server: FakeServer, complaints: Complaints) -> None:
    complaints.expected = ("401",)
    server.key = "secret"
    page.reload()
    dialog = page.get_by_role("dialog", name="The server asks for a key")
    field = dialog.get_by_label("API key")
    expect(dialog.get_by_text("This key is wrong")).to_be_hidden()
    for wrong in ("wrong", "ключ"):  # the latter cannot even be sent
        field.fill(wrong)
        field.press("Enter")
        expect(dialog.get_by_text("This key is wrong: the server refused it.")).to_be_visible()
        expect(field).to_have_value(wrong)
        expect(field).to_have_attribute("aria-invalid", "true")
    dialog.get_by_label("API key").fill("secret")
    dialog.get_by_role("button", name="Use this key").click()
    expect(dialog).to_be_hidden()
    expect(page.get_by_label("Model", exact=True)).to_have_value("tiny-model")
    say(page, "hello")
    finished(page)
    assert server.requests[0]["authorization"] == "Bearer secret"
    keeps = "(storage) => JSON.stringify(globalThis[storage]).includes('secret')"
    assert page.evaluate(keeps, "sessionStorage")
    assert not page.evaluate(keeps, "localStorage")
    page.reload()
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    expect(dialog).to_be_hidden()


def test_key_can_be_declined(page: Page, server: FakeServer, complaints: Complaints) -> None:
    complaints.expected = ("401",)
    expect(page.get_by_label("Model", exact=True)).to_have_value("tiny-model")
    server.key = "secret"
    say(page, "hello")
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("alert")).to_contain_text("There is no such key.")


def test_wrong_key_is_said_wherever_it_is_met(page: Page, server: FakeServer, complaints: Complaints) -> None:
    complaints.expected = ("401",)
    server.key = "secret"
    page.reload()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("API key").fill("wrong")
    dialog.get_by_role("button", name="Use this key").click()
    refusal = dialog.get_by_text("This key is wrong")
    expect(refusal).to_be_visible()
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.get_by_label("Model", exact=True)).to_have_text("wrong key, no model")
    expect(page.get_by_role("region", name="Engine")).to_contain_text("the key is wrong")
    page.get_by_role("button", name="API key").click()  # the reader's own wish: nothing is wrong with it yet
    expect(refusal).to_be_hidden()
    dialog.get_by_label("API key").fill("")
    dialog.get_by_role("button", name="Use this key").click()
    expect(dialog).to_be_visible()
    expect(refusal).to_be_hidden()  # there is none
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.get_by_label("Model", exact=True)).to_have_text("no key, no model")
    expect(page.get_by_role("region", name="Engine")).to_contain_text("needs a key")


def test_answer_that_was_cut_says_where(page: Page) -> None:
    say(page, "cut-off")
    expect(answers(page)).to_contain_text("cut at 5 tokens")
    page.reload()
    expect(answers(page)).to_contain_text("cut at 5 tokens")


def test_one_of_several_models_is_asked(page: Page, server: FakeServer) -> None:
    server.models = ["tiny-model", "other-model"]
    page.reload()
    page.get_by_text("Off", exact=True).click()
    page.get_by_label("Model", exact=True).select_option("other-model")
    expect(page.get_by_role("group", name="Thinking")).to_be_hidden()  # it cannot be turned off
    page.reload()
    say(page, "hello")
    finished(page)
    assert server.requests[0]["model"] == "other-model"
    assert "chat_template_kwargs" not in server.requests[0]
    page.get_by_label("Model", exact=True).select_option("tiny-model")
    expect(page.get_by_role("radio", name="Off")).to_be_checked()


def test_end_is_followed_until_the_reader_scrolls_up(page: Page) -> None:
    scroller = page.locator("#scroller")
    distance = "e => e.scrollHeight - e.clientHeight - e.scrollTop"
    say(page, "long")
    expect(answers(page)).to_contain_text("Paragraph 25")
    assert scroller.evaluate(distance) < 40
    scroller.hover()
    page.mouse.wheel(0, -300)
    latest = page.get_by_role("button", name="Latest")
    expect(latest).to_be_visible()
    top = scroller.evaluate("e => e.scrollTop")
    page.wait_for_timeout(400)
    assert scroller.evaluate("e => e.scrollTop") == top
    latest.click()
    expect(latest).to_be_hidden()
    finished(page)
    assert scroller.evaluate(distance) < 40


def test_nothing_jumps_while_an_answer_streams(page: Page) -> None:
    boxes = """() => ['.bar', '#sidebar', '#panel', '#composer', '.question', '.prose > p:first-child']
        .map((one) => document.querySelector(one).getBoundingClientRect())
        .map(({x, y, width}) => [x, y, width])"""
    say(page, "slow")
    expect(answers(page)).to_contain_text("It goes on")
    before = page.evaluate(boxes)
    page.wait_for_timeout(700)
    page.keyboard.press("Escape")
    expect(answers(page)).to_contain_text("stopped")
    assert page.evaluate(boxes) == before


def test_shift_enter_and_input_methods_do_not_send(page: Page, server: FakeServer) -> None:
    prompt(page).press_sequentially("one")
    prompt(page).press("Shift+Enter")
    prompt(page).press_sequentially("two")
    prompt(page).evaluate(
        """e => e.dispatchEvent(
            new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"""
    )
    expect(prompt(page)).to_have_value("one\ntwo")
    assert server.requests == []
    prompt(page).press("Enter")
    finished(page)
    assert server.requests[0]["messages"][0]["content"] == "one\ntwo"


def test_full_storage_drops_probabilities_before_words(page: Page) -> None:
    page.get_by_role("button", name=re.compile("Glass box")).click()
    say(page, "an old one")
    finished(page)
    # All but a little of what the browser keeps for a page is taken.
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
    finished(page)
    page.reload()
    expect(answers(page)).to_contain_text("You said a new one.")
    page.get_by_role("button", name="an old one", exact=True).click()
    expect(answers(page)).to_contain_text("You said an old one.")
    expect(answers(page)).to_contain_text("no probabilities")


def test_answer_can_be_copied(page: Page) -> None:
    say(page, "this")
    finished(page)
    page.get_by_role("button", name="Copy", exact=True).click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "You said **this**."
