// Token inspector: a card with a token's alternatives, over the page, so that nothing in the page moves.

import { element } from "./element.js";
import { entropy, percent, probability, visible } from "./token.js";

const MARGIN = 8;

export class Inspector {
  /**
   * @param {HTMLElement} root an element with the popover attribute
   * @param {(text: string) => void} announce for those who do not see it; the focus stays at the token
   */
  constructor(root, announce) {
    this.root = root;
    this.announce = announce;
    this.anchor = null;
    this.onclose = null;
    const place = () => this.anchor && this.place();
    document.addEventListener("scroll", place, { capture: true, passive: true });
    addEventListener("resize", place);
    document.addEventListener("pointerdown", (event) => {
      if (this.anchor && !root.contains(event.target) && !event.target.closest(".token, .chart")) this.close();
    });
  }

  /**
   * Show a token's alternatives beside the element that stands for it.
   *
   * @param {{index: number, count: number, text: string | null}} where it stands; `text` is the character it is part of
   */
  open(anchor, token, where, onclose) {
    if (this.anchor !== anchor) this.close();
    this.anchor = anchor;
    this.onclose = onclose;
    anchor.setAttribute("aria-expanded", "true");
    this.root.replaceChildren(...card(token, where));
    if (!this.root.matches(":popover-open")) this.root.showPopover();
    this.place();
    this.announce(spoken(token));
  }

  /** Put the card away; tells whether there was one. */
  close() {
    if (!this.anchor) return false;
    const { onclose } = this;
    this.anchor.setAttribute("aria-expanded", "false");
    this.anchor = this.onclose = null;
    this.root.hidePopover();
    onclose?.();
    return true;
  }

  place() {
    if (!this.anchor.isConnected) {
      this.close();
      return;
    }
    const token = [...this.anchor.getClientRects()].at(-1);
    this.root.style.maxHeight = "";
    const { left, top, most } = position(token, this.root.getBoundingClientRect());
    if (most) this.root.style.maxHeight = `${Math.floor(most)}px`;
    this.root.style.left = `${Math.round(left)}px`;
    this.root.style.top = `${Math.round(top)}px`;
  }
}

/**
 * Where there is room for the card: below the token, above it, at a side of it, or, where there is none, where there
 * is most, and no higher than that.
 */
function position(token, { width, height }) {
  const within = (value, size, whole) => Math.max(MARGIN, Math.min(value, whole - size - MARGIN));
  const left = within(token.left - 16, width, innerWidth);
  const top = within(token.bottom + MARGIN, height, innerHeight);
  if (token.bottom + height + 2 * MARGIN <= innerHeight) return { left, top };
  if (token.top >= height + 2 * MARGIN) return { left, top: token.top - height - MARGIN };
  if (token.right + width + 2 * MARGIN <= innerWidth) return { left: token.right + MARGIN, top };
  if (token.left >= width + 2 * MARGIN) return { left: token.left - width - MARGIN, top };
  const [above, below] = [token.top - 2 * MARGIN, innerHeight - token.bottom - 2 * MARGIN];
  return above > below ? { left, top: MARGIN, most: above } : { left, top: token.bottom + MARGIN, most: below };
}

function card(token, { index, count, text }) {
  const share = probability(token);
  const facts = [`token ${index + 1} of ${count}`, `log-probability ${token.logprob.toFixed(3).replace("-", "−")}`];
  if (token.top.length > 1) facts.push(`entropy of the ${token.top.length} shown ${entropy(token).toFixed(2)} bits`);
  const part = token.bytes && element("p", { class: "inspector-facts" }, partOf(token, text));
  return [
    element(
      "p",
      { class: "inspector-title" },
      element("code", {}, visible(token)),
      element("span", {}, percent(share)),
    ),
    element("p", { class: "inspector-facts" }, facts.join(" · ")),
    part,
    alternatives(token),
    element("p", { class: "inspector-facts" }, "The model’s own probabilities, before temperature and filters."),
  ].filter(Boolean);
}

function spoken(token) {
  const likeliest = token.top.slice(0, 5).map((one) => `${visible(one)} ${percent(probability(one))}`);
  return `${visible(token)}, ${percent(probability(token))}. Likeliest: ${likeliest.join(", ")}`;
}

function partOf({ bytes }, text) {
  const what = `${bytes.length} ${bytes.length === 1 ? "byte" : "bytes"}`;
  return text === null
    ? `${what} that never became a character`
    : `${what} of “${text.trim()}”, which takes several tokens`;
}

function alternatives(token) {
  const chosen = ({ text, logprob, bytes }) => visible({ text, bytes }) === visible(token) && logprob === token.logprob;
  const found = token.top.findIndex(chosen);
  const rows = token.top.map((one, i) => row(visible(one), probability(one), i === found));
  if (found < 0) rows.push(row(visible(token), probability(token), true));
  const shown = token.top.reduce((sum, one) => sum + probability(one), found < 0 ? probability(token) : 0);
  const rest = Math.max(0, 1 - shown);
  if (rest >= 0.0005) rows.push(row("everything else", rest, false, "rest"));
  return element("ol", { class: "alternatives", "aria-label": "Alternatives, the most probable first" }, rows);
}

function row(label, share, chosen, kind = "") {
  const bar = element("span", { class: "alternative-bar", "aria-hidden": "true" }, element("span"));
  bar.firstChild.style.width = `${100 * share}%`;
  const name =
    kind === "rest"
      ? element("span", { class: "alternative-name" }, label)
      : element("code", { class: "alternative-name" }, label);
  const mark = chosen && element("span", { class: "hidden" }, " (chosen)");
  const attributes = { class: `alternative ${chosen ? "chosen" : ""} ${kind}` };
  return element("li", attributes, name, mark, bar, element("span", { class: "alternative-share" }, percent(share)));
}
