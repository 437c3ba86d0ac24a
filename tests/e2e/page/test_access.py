"""The page for everyone: by keyboard, by screen reader, narrow and wide, light and dark."""

import itertools
import re

import pytest
from playwright.sync_api import Browser, Page, expect

from .conftest import Complaints, opened
from .fake_server import FakeServer

INTERACTIVE = {"button", "textbox", "spinbutton", "combobox", "radio", "link", "checkbox", "dialog"}

# Of each text that can be seen: what it says, and its contrast with what is behind it (WCAG 2.2).
CONTRASTS = """() => {
  const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = rgba(getComputedStyle(element).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const luminance = (colour) => colour.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  for (let node; (node = walker.nextNode());) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility() || element.closest('.hidden, .skip, :disabled')) continue;
    const [a, b] = [rgba(getComputedStyle(element).color), behind(element)].map(luminance);
    found.push([node.data.trim().slice(0, 30), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
}"""


def say(page: Page, text: str) -> None:
    page.get_by_role("textbox", name="Your message").fill(text)
    page.get_by_role("textbox", name="Your message").press("Enter")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def fill(page: Page) -> None:
    """One of everything."""
    say(page, "think")
    page.get_by_role("button", name=re.compile("Glass box")).click()
    say(page, "one `code` [link](https://e.org)\n\n```\ncode\n```")
    say(page, "fail")


def test_everything_has_a_name(page: Page) -> None:
    fill(page)
    page.get_by_role("button", name="Edit the question").last.click()
    page.get_by_role("button", name="Ask this").click()
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    page.get_by_role("button", name="Edit the question").first.click()
    page.locator(".token:visible").first.click()
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    roles: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            roles.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert INTERACTIVE - {"checkbox"} <= set(roles)
    assert {role: names for role, names in roles.items() if role in INTERACTIVE and "" in names} == {}
    for landmark in ("banner", "navigation", "main", "complementary"):
        assert len(roles[landmark]) == 1
    assert page.locator("html").get_attribute("lang") == "en"
    levels = page.locator("h1, h2, h3, h4, h5, h6").evaluate_all("all => all.map((e) => Number(e.localName[1]))")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_what_happens_is_announced(page: Page) -> None:
    status = page.get_by_role("status")
    expect(status).to_have_attribute("aria-live", "polite")
    say(page, "hello")
    expect(status).to_have_text("Answer: You said hello.")  # once and whole, not word by word
    assert page.locator("#messages").get_attribute("aria-live") is None


def test_keyboard_alone(page: Page, server: FakeServer) -> None:
    expect(page.get_by_role("textbox", name="Your message")).to_be_focused()  # at once
    page.get_by_role("button", name="Conversations", exact=True).focus()
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("link", name="Skip to the message box")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("textbox", name="Your message")).to_be_focused()
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    expect(page.locator(".answer")).to_contain_text("You said hello.")
    expect(page.get_by_role("textbox", name="Your message")).to_be_focused()
    stops: list[str] = []
    page.get_by_role("link", name="Skip to the message box").focus()
    while len(stops) < 60:
        page.keyboard.press("Tab")
        name, outlined = page.evaluate(
            """() => {
              const e = document.activeElement;
              if (e === document.body) return [null, null];  // past the last stop
              const style = getComputedStyle(e.matches('#prompt') ? e.parentElement
                : e.matches('[type=radio]') ? e.nextElementSibling : e);
              const name = e.getAttribute('aria-label') ?? e.name ?? '';
              return [name || e.textContent.trim() || e.id, style.outlineStyle !== 'none' && style.outlineWidth];
            }"""
        )
        if name is None:
            break
        assert outlined == "2px", f"the focus cannot be seen on {name}"
        stops.append(name)
    order = ["Conversations", "Glass box: show the probability of each token", "New conversation", "hello"]
    order += [
        "Edit the question",
        "Copy",
        "Regenerate",
        "prompt",
        "Send",
        "Reset",
        "temperature",
        "seed",
        "thinking",
        "system",
    ]
    places = [stops.index(name) for name in order]
    assert places == sorted(places), stops


def test_keyboard_stops_and_answers_dialogs(page: Page) -> None:
    page.get_by_role("textbox", name="Your message").fill("slow")
    page.keyboard.press("Enter")
    expect(page.locator(".answer")).to_contain_text("It goes on")
    page.keyboard.press("Escape")
    expect(page.locator(".answer")).to_contain_text("stopped")
    page.get_by_role("button", name="Clear all").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog").get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator(".answer")).to_have_count(1)
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator(".answer")).to_have_count(0)


def test_dialog_that_is_opened_again_at_once(page: Page) -> None:
    say(page, "hello")
    # The browser tells of the first one's end when the second one is open.
    page.evaluate(
        """() => {
          const clear = document.querySelector('#clear');
          clear.click();
          document.querySelector('#confirm-dialog button[type=button]').click();
          clear.click();
        }"""
    )
    page.wait_for_timeout(100)
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator(".answer")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser: Browser, server: FakeServer, complaints: Complaints, scheme: str) -> None:
    complaints.expected = ("500",)
    with opened(browser, server.url, complaints, color_scheme=scheme) as page:
        fill(page)
        page.locator(".token:visible").first.click()
        found = page.evaluate(CONTRASTS)
        page.get_by_role("button", name="Edit the question").first.click()
        server.stats["draining"] = {"answers": 1, "seconds_left": 9.0}
        expect(page.locator("#notice")).to_be_visible()
        found += page.evaluate(CONTRASTS)
        page.route("**/stats", lambda route: route.fulfill(status=500, json={}))
        expect(page.locator("#engine")).to_contain_text("as they were")
        found += page.evaluate(CONTRASTS)
        for button in ("Glass box", "Clear all"):  # the answers as text, a dialog
            page.get_by_role("button", name=re.compile(button)).click()
            found += page.evaluate(CONTRASTS)
    assert len(found) > 60
    assert [(text, round(ratio, 2)) for text, ratio in found if ratio < 4.5] == []


@pytest.mark.parametrize(("system", "shown"), [("light", "rgb(251, 250, 247)"), ("dark", "rgb(22, 22, 20)")])
def test_theme(browser: Browser, server: FakeServer, complaints: Complaints, system: str, shown: str) -> None:
    with opened(browser, server.url, complaints, color_scheme=system) as page:
        background = "() => getComputedStyle(document.body).backgroundColor"
        assert page.evaluate(background) == shown
        page.get_by_role("button", name="Theme: system").click()
        assert page.evaluate(background) == "rgb(251, 250, 247)"
        page.get_by_role("button", name="Theme: light").click()
        assert page.evaluate(background) == "rgb(22, 22, 20)"
        page.reload()
        assert page.evaluate(background) == "rgb(22, 22, 20)"
        page.get_by_role("button", name="Theme: dark").click()
        assert page.evaluate(background) == shown


@pytest.mark.parametrize("width", [320, 360, 768, 1100, 1600])
def test_width(browser: Browser, server: FakeServer, complaints: Complaints, width: int) -> None:
    with opened(browser, server.url, complaints, viewport={"width": width, "height": 700}) as page:
        fill(page)
        say(page, "x" * 400)
        page.locator(".token:visible").first.click()
        for element in (page.locator("body"), page.locator("#scroller"), page.locator(".dock")):
            assert element.evaluate("e => e.scrollWidth <= e.clientWidth"), f"{element} is wider than the window"
        inside = """e => {
          const {left, right, top, bottom} = e.getBoundingClientRect();
          return left >= 0 && right <= innerWidth && top >= 0 && bottom <= innerHeight;
        }"""
        edges = "e => [e.getBoundingClientRect().left, e.getBoundingClientRect().right]"
        assert page.locator("#messages").evaluate(edges) == page.locator("#composer").evaluate(edges)
        for name in ("#inspector", "#prompt", "#send", "#glass-toggle", "#panel-toggle", "#sidebar-toggle"):
            assert page.locator(name).evaluate(inside), f"{name} is not in the window"


def test_parts_lie_over_the_conversation_where_it_is_narrow(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    sidebar, panel = page.get_by_role("navigation"), page.get_by_role("complementary")
    expect(sidebar).to_be_hidden()
    expect(panel).to_be_hidden()
    page.get_by_role("button", name="Conversations").click()
    expect(sidebar.get_by_role("button", name="New conversation")).to_be_focused()
    page.get_by_role("button", name="Engine and parameters").click()
    expect(panel).to_be_visible()
    expect(sidebar).to_be_hidden()
    page.keyboard.press("Escape")
    expect(panel).to_be_hidden()
    expect(page.get_by_role("button", name="Engine and parameters")).to_be_focused()
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("button", name="New conversation").click()
    expect(sidebar).to_be_hidden()
    expect(page.get_by_role("textbox", name="Your message")).to_be_focused()


@pytest.mark.parametrize("width", [1024, 1100, 1440])
def test_parts_stand_beside_the_conversation_where_there_is_room(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 768})
    sidebar, panel = page.get_by_role("navigation"), page.get_by_role("complementary")
    expect(sidebar).to_be_visible()
    expect(panel).to_be_visible()
    edges = "e => [e.getBoundingClientRect().left, e.getBoundingClientRect().right]"
    boxes = [part.evaluate(edges) for part in (sidebar, page.get_by_role("main"), panel)]
    assert [edge for box in boxes for edge in box] == [0, *(boxes[1][0],) * 2, *(boxes[1][1],) * 2, width]
    assert boxes[1][1] - boxes[1][0] >= 500
    assert not page.locator("main").evaluate("e => e.inert")
    say(page, "hello")


def test_still_for_those_who_want_it(browser: Browser, server: FakeServer, complaints: Complaints) -> None:
    with opened(browser, server.url, complaints, reduced_motion="reduce") as page:
        page.get_by_role("textbox", name="Your message").fill("slow")
        page.keyboard.press("Enter")
        expect(page.locator(".answer")).to_contain_text("It goes on")
        assert page.evaluate("document.getAnimations().length") == 0


def test_policy_is_in_force(page: Page, complaints: Complaints) -> None:
    complaints.expected = ("Content Security Policy", "TrustedHTML", "Refused", "violates")
    attempts = """async () => {
      const tries = {
        markup: () => { document.body.innerHTML = '<b>x</b>' },
        style: () => {
          document.body.setAttribute('style', 'outline: 3px solid red');
          if (getComputedStyle(document.body).outlineStyle === 'none') throw new Error('not applied');
        },
        elsewhere: () => fetch('http://127.0.0.1:9/'),
      };
      const allowed = [];
      for (const [name, attempt] of Object.entries(tries)) {
        try { await attempt(); allowed.push(name); } catch {}
      }
      return allowed;
    }"""
    assert page.evaluate(attempts) == []
    assert complaints.texts, "the browser saw no violation"
