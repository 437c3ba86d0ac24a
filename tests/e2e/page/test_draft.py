"""What was typed and not sent: it stays with its conversation, over a reload, too."""

from playwright.sync_api import Locator, Page, expect


def prompt(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Your message")


def say(page: Page, text: str) -> None:
    prompt(page).fill(text)
    prompt(page).press("Enter")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def conversation(page: Page, title: str) -> Locator:
    return page.get_by_role("button", name=title, exact=True)


def new(page: Page) -> None:
    page.get_by_role("button", name="New conversation").click()


def test_drafts_stay_with_their_conversations(page: Page) -> None:
    say(page, "the first")
    prompt(page).fill("for the first")
    new(page)
    expect(prompt(page)).to_have_value("")
    say(page, "the second")
    expect(prompt(page)).to_have_value("")
    prompt(page).fill("for the second")
    new(page)
    prompt(page).fill("for a new one")
    for title, text in (("the first", "for the first"), ("the second", "for the second")):
        conversation(page, title).click()
        expect(prompt(page)).to_have_value(text)
    new(page)
    expect(prompt(page)).to_have_value("for a new one")


def test_drafts_survive_a_reload(page: Page) -> None:
    prompt(page).fill("not\nsent")
    page.reload()
    expect(prompt(page)).to_have_value("not\nsent")
    say(page, "sent")
    prompt(page).fill("and then")
    page.reload()
    expect(prompt(page)).to_have_value("and then")
    new(page)
    expect(prompt(page)).to_have_value("")  # what was sent is no draft


def test_what_is_typed_during_an_answer_stays(page: Page) -> None:
    prompt(page).fill("slow")
    prompt(page).press("Enter")
    expect(page.locator(".answer")).to_contain_text("It goes on")
    prompt(page).fill("meanwhile")
    prompt(page).press("Enter")
    expect(prompt(page)).to_have_value("meanwhile")
    new(page)
    expect(prompt(page)).to_have_value("")
    conversation(page, "slow …").click()
    expect(prompt(page)).to_have_value("meanwhile")
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator(".answer")).to_contain_text("stopped")
    expect(prompt(page)).to_have_value("meanwhile")


def test_deleted_conversation_takes_its_drafts_with_it(page: Page) -> None:
    say(page, "secret")
    prompt(page).fill("draft one")
    page.get_by_role("button", name="Edit the question").click()
    page.get_by_role("textbox", name="The question in other words").fill("draft two")
    page.get_by_role("button", name="Delete “secret”").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(prompt(page)).to_have_value("")
    assert page.evaluate("Object.values({...sessionStorage}).filter((text) => /draft/.test(text))") == []


def test_edit_under_way_stays_with_its_question(page: Page) -> None:
    say(page, "the first")
    field = page.get_by_role("textbox", name="The question in other words")
    page.get_by_role("button", name="Edit the question").click()
    field.fill("the first, better")
    new(page)
    say(page, "the second")
    expect(field).to_be_hidden()
    conversation(page, "the first").click()
    expect(field).to_have_value("the first, better")
    page.reload()
    expect(field).to_have_value("the first, better")
    field.press("Enter")
    expect(page.locator(".answer")).to_contain_text("You said the first, better.")
    page.reload()
    expect(field).to_be_hidden()
