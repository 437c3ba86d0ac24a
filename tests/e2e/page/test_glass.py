"""The glass box: what is shown of the tokens of an answer, and how one gets at it."""

import math
import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Locator, Page, expect

from .fake_server import FakeServer, Piece, token, words


@pytest.fixture
def ask(page: Page) -> Callable[[str], None]:
    """Ask with the glass box on, and wait for the answer."""
    page.get_by_role("button", name=re.compile("Glass box")).click()

    def ask(text: str) -> None:
        page.get_by_role("textbox", name="Your message").fill(text)
        page.get_by_role("textbox", name="Your message").press("Enter")
        expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()

    return ask


def tokens(page: Page) -> Locator:
    return page.locator(".glass-text [role=button]:visible")


def card(page: Page) -> Locator:
    return page.get_by_role("dialog", name="Alternatives to a token")


def rectangles(page: Page) -> list[list[float]]:
    """Where everything is, but the card, and the mark on the chart of entropy."""
    return page.evaluate(
        """() => [...document.querySelectorAll('body *')].filter((e) => !e.closest('#inspector, #engine, .chart-mark'))
            .map((e) => e.getBoundingClientRect()).map(({x, y, width, height}) => [x, y, width, height])"""
    )


def test_tokens_are_coloured_by_their_probability(page: Page, server: FakeServer, ask: Callable[[str], None]) -> None:
    shares = [0.97, 0.9, 0.6, 0.3, 0.1, 0.01]
    server.answer = lambda said: [Piece(f" w{i}", tokens=(token(f" w{i}", p),)) for i, p in enumerate(shares)]
    ask("go")
    assert server.requests[0]["logprobs"] is True
    assert server.requests[0]["top_logprobs"] == 10
    expect(tokens(page)).to_have_count(len(shares))
    levels = [re.findall(r"level-(\d)", tokens(page).nth(i).get_attribute("class") or "") for i in range(len(shares))]
    assert levels == [[str(i)] for i in range(len(shares))]
    colours = tokens(page).evaluate_all("all => all.map((e) => getComputedStyle(e).backgroundColor)")
    assert len(set(colours)) == len(shares)
    legend = page.locator("#legend li")
    assert (
        legend.locator(".token").evaluate_all("all => all.map((e) => getComputedStyle(e).backgroundColor)") == colours
    )
    expect(legend.nth(0)).to_contain_text("95\N{EN DASH}100 %")
    expect(legend.nth(5)).to_contain_text("0\N{EN DASH}5 %")


def test_click_shows_the_alternatives_and_moves_nothing(
    page: Page, server: FakeServer, ask: Callable[[str], None]
) -> None:
    server.answer = lambda said: [*words("It is "), Piece(" Paris", tokens=(token(" Paris", 0.5, Rome=0.3, Nice=0.1),))]
    ask("where?")
    before = rectangles(page)
    page.get_by_role("button", name=re.compile("^␣Paris, 50.0 %")).click()
    expect(card(page).get_by_role("listitem")).to_contain_text(
        ["␣Paris (chosen)50.0 %", "Rome30.0 %", "Nice10.0 %", "everything else10.0 %"]
    )
    widths = card(page).locator(".alternative-bar span").evaluate_all("all => all.map((e) => e.style.width)")
    assert [round(float(width.rstrip("%"))) for width in widths] == [50, 30, 10, 10]
    bits = -sum(p / 0.9 * math.log2(p / 0.9) for p in (0.5, 0.3, 0.1))
    expect(card(page)).to_contain_text(f"entropy of the 3 shown {bits:.2f} bits")
    assert rectangles(page) == before
    page.get_by_role("button", name=re.compile("^␣Paris")).click()
    expect(card(page)).to_be_hidden()
    assert rectangles(page) == before


def test_keyboard_reaches_every_token(page: Page, ask: Callable[[str], None]) -> None:
    ask("keys")
    tokens(page).first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(card(page)).to_contain_text("token 2 of 3")
    expect(page.get_by_role("status")).to_have_text(
        re.compile(r"^␣said, 97.0 %\. Likeliest: ␣said 97.0 %, ␣other 1.5 %")
    )
    page.keyboard.press("ArrowRight")
    expect(card(page)).to_contain_text("token 3 of 3")
    page.keyboard.press("Home")
    expect(card(page)).to_contain_text("token 1 of 3")
    page.keyboard.press("Escape")
    expect(card(page)).to_be_hidden()
    expect(tokens(page).first).to_be_focused()
    page.keyboard.press("End")
    expect(tokens(page).last).to_be_focused()
    page.keyboard.press("Tab")  # the tokens are one stop
    assert not page.evaluate("document.activeElement.matches('.glass-text *')")
    page.keyboard.press("Shift+Tab")
    expect(tokens(page).last).to_be_focused()


def test_token_that_is_not_among_the_shown_ones(page: Page, server: FakeServer, ask: Callable[[str], None]) -> None:
    rare = token("rare", 0.001)
    rare["top_logprobs"] = token("usual", 0.9)["top_logprobs"]
    server.answer = lambda said: [Piece("rare", tokens=(rare,))]
    ask("go")
    tokens(page).first.click()
    expect(card(page).get_by_role("listitem")).to_contain_text(
        ["usual90.0 %", "rare (chosen)0.10 %", "everything else9.9 %"]
    )


def test_tokens_that_share_a_character(page: Page, ask: Callable[[str], None]) -> None:
    ask("bytes")
    shared = page.locator(".shared")
    expect(shared.locator(".shared-text")).to_have_text("\N{GRINNING FACE}")
    expect(shared.get_by_role("button")).to_have_text(["20 F0 9F", "98", "80"])
    expect(tokens(page)).to_have_text(["Yes", "20 F0 9F", "98", "80", "↵\n!"], use_inner_text=True)
    page.get_by_role("button", name="98, 70.0 %, bytes of \N{GRINNING FACE}").click()
    expect(card(page)).to_contain_text("1 byte of “\N{GRINNING FACE}”, which takes several tokens")


def test_bytes_that_never_become_a_character(page: Page, server: FakeServer, ask: Callable[[str], None]) -> None:
    server.answer = lambda said: [Piece("a", tokens=(token("a", 0.9), token(b"\xf0\x9f", 0.5))), *words("b")]
    ask("go")
    expect(tokens(page)).to_have_text(["a", "F0 9F", "b"])
    tokens(page).nth(1).click()
    expect(card(page)).to_contain_text("2 bytes that never became a character")


def test_entropy_is_named_and_charted(page: Page, server: FakeServer, ask: Callable[[str], None]) -> None:
    server.answer = lambda said: [
        Piece("a", tokens=(token("a", 0.5, b=0.5),)),
        Piece("b", tokens=(token("b", 1.0),)),
        Piece("c", tokens=(token("c", 0.2, b=0.2),)),
    ]
    ask("go")
    expect(page.locator(".glass-caption")).to_have_text(
        "Entropy of the 2 shown alternatives, in bits · mean 0.67 · highest 1.00"
    )
    expect(page.get_by_role("status")).to_have_text("Answer: abc")
    chart = page.get_by_role("img", name=re.compile("highest 1.00 at token 1, a"))
    box = chart.bounding_box()
    assert box is not None
    chart.click(position={"x": box["width"] * 5 / 6, "y": 10})
    expect(card(page)).to_contain_text("token 3 of 3")


def test_glass_box_can_be_turned_off_and_on_and_survives_a_reload(page: Page, ask: Callable[[str], None]) -> None:
    ask("hello")
    expect(tokens(page)).to_have_count(3)
    toggle = page.get_by_role("button", name=re.compile("Glass box"))
    toggle.click()
    expect(tokens(page)).to_have_count(0)
    expect(page.locator(".answer strong")).to_have_text("hello")
    toggle.click()
    page.reload()
    expect(toggle).to_have_attribute("aria-pressed", "true")
    expect(tokens(page)).to_have_count(3)


def test_answer_without_probabilities_says_so(page: Page) -> None:
    page.get_by_role("textbox", name="Your message").fill("hello")
    page.get_by_role("textbox", name="Your message").press("Enter")
    expect(page.locator(".answer")).to_contain_text("tokens")
    page.get_by_role("button", name=re.compile("Glass box")).click()
    expect(page.locator(".answer")).to_contain_text("no probabilities: the glass box was off")
    expect(page.locator(".answer strong")).to_have_text("hello")
    page.get_by_role("button", name="Regenerate").click()
    expect(tokens(page)).to_have_count(3)


def test_reasoning_has_its_own_tokens(page: Page, ask: Callable[[str], None]) -> None:
    ask("think")
    expect(tokens(page)).to_have_text(["It", "is", "so."])
    page.get_by_text(re.compile("Thought")).click()
    expect(page.get_by_role("group", name="Tokens of the reasoning").get_by_role("button")).to_have_count(3)


def test_tokens_stream(page: Page) -> None:
    page.get_by_role("button", name=re.compile("Glass box")).click()
    page.get_by_role("textbox", name="Your message").fill("slow")
    page.get_by_role("textbox", name="Your message").press("Enter")
    expect(tokens(page).nth(5)).to_be_visible()
    tokens(page).nth(4).click()
    expect(card(page)).to_contain_text("token 5 of")
    node = tokens(page).nth(2).element_handle()
    before = page.locator(".glass-text").inner_text()
    page.wait_for_timeout(400)
    assert len(page.locator(".glass-text").inner_text()) > len(before)
    assert node.evaluate("e => e.isConnected")  # what is there is not made anew
    expect(card(page)).to_be_visible()
    page.keyboard.press("Escape")  # closes the card, and the answer goes on
    expect(card(page)).to_be_hidden()
    expect(page.locator(".answer")).to_contain_text("Answering…")


def test_card_keeps_its_place_while_the_answer_grows(page: Page) -> None:
    page.set_viewport_size({"width": 700, "height": 500})
    page.get_by_role("button", name=re.compile("Glass box")).click()
    page.get_by_role("textbox", name="Your message").fill("slow")
    page.get_by_role("textbox", name="Your message").press("Enter")
    expect(tokens(page).nth(60)).to_be_visible()
    tokens(page).nth(58).click()
    before = [tokens(page).nth(58).bounding_box(), card(page).bounding_box()]
    page.wait_for_timeout(1500)
    assert [tokens(page).nth(58).bounding_box(), card(page).bounding_box()] == before
    expect(page.get_by_role("button", name="Latest")).to_be_visible()


@pytest.mark.parametrize("size", [(1280, 800), (1000, 420), (360, 740)])
def test_card_leaves_its_token_in_view(
    page: Page, server: FakeServer, ask: Callable[[str], None], size: tuple[int, int]
) -> None:
    others = {f" other{i}": 0.01 for i in range(9)}
    server.answer = lambda said: [Piece(f" word{i}", tokens=(token(f" word{i}", 0.5, **others),)) for i in range(60)]
    page.set_viewport_size({"width": size[0], "height": size[1]})
    ask("go")
    overlap = """token => {
      const a = [...token.getClientRects()].at(-1);
      const b = document.querySelector('#inspector').getBoundingClientRect();
      return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
    }"""
    for i in range(0, 60, 7):
        tokens(page).nth(i).click()
        expect(card(page).get_by_role("listitem")).to_have_count(11)
        assert not tokens(page).nth(i).evaluate(overlap), f"the card lies over token {i}"
        page.keyboard.press("Escape")
