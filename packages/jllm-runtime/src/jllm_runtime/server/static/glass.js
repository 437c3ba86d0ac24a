// Glass box: an answer token by token, each coloured by its probability, and a chart of the entropy.

import { Chart } from "./chart.js";
import { element } from "./element.js";
import { characters, entropy, level, levelNames, percent, probability, visible } from "./token.js";

export class Glass {
  /** @param {import("./inspector.js").Inspector} inspector @param {string} label what the tokens are of */
  constructor(inspector, label) {
    this.inspector = inspector;
    this.tokens = [];
    this.groups = []; // {start, tokens, text, node}
    this.caption = element("p", { class: "glass-caption" });
    this.chart = new Chart("glass-chart", "");
    this.text = element("div", { class: "glass-text", role: "group", "aria-label": label });
    this.element = element("div", { class: "glass" }, this.caption, this.chart.element, this.text);
    this.text.addEventListener("click", (event) => this.clicked(event));
    this.text.addEventListener("keydown", (event) => this.pressed(event));
    this.text.addEventListener("focusin", (event) => this.focused(event));
    this.chart.element.addEventListener("click", (event) =>
      this.show(this.chart.at(event.clientX, this.tokens.length)),
    );
  }

  /** Show the tokens of an answer; what is shown already stays as it is. */
  set(tokens) {
    this.tokens = tokens;
    // The last group may be half a character that goes on.
    const last = this.groups.at(-1);
    const from = last ? last.start : 0;
    const fresh = characters(tokens, from);
    if (last && fresh[0]?.tokens.length === last.tokens.length && fresh[0].text === last.text) fresh.shift();
    else if (last) this.groups.pop().node.remove();
    for (const group of fresh) {
      const node = render(group);
      this.groups.push({ ...group, node });
      this.text.append(node);
    }
    const first = this.text.querySelector(".token");
    if (first && !this.text.querySelector('[tabindex="0"]')) first.tabIndex = 0;
    this.describe();
  }

  describe() {
    const values = this.tokens.map(entropy);
    const shown = Math.max(1, ...this.tokens.map(({ top }) => top.length));
    this.chart.set(values, Math.max(1, Math.log2(shown)));
    const highest = Math.max(0, ...values);
    const mean = values.reduce((a, b) => a + b, 0) / Math.max(1, values.length);
    const name = `Entropy of the ${shown} shown alternatives`;
    this.caption.textContent = `${name}, in bits · mean ${mean.toFixed(2)} · highest ${highest.toFixed(2)}`;
    const where = values.indexOf(highest);
    const at = where < 0 ? "" : ` at token ${where + 1}, ${visible(this.tokens[where])}`;
    this.chart.element.setAttribute(
      "aria-label",
      `${name} along the answer: mean ${mean.toFixed(2)} bits, highest ${highest.toFixed(2)}${at}`,
    );
  }

  node(index) {
    return this.text.querySelector(`[data-index="${index}"]`);
  }

  /** Open the card of a token, and go there. */
  show(index) {
    const node = this.node(index);
    if (!node) return;
    const { start, text, tokens } = this.groups.findLast((group) => group.start <= index);
    node.focus({ preventScroll: true });
    node.scrollIntoView({ block: "nearest" });
    const where = { index, count: this.tokens.length, text };
    this.inspector.open(node, tokens[index - start], where, () => this.chart.select(null));
    this.chart.select(index);
  }

  clicked(event) {
    const node = event.target.closest(".token");
    if (!node) return;
    if (this.inspector.anchor === node) this.inspector.close();
    else this.show(Number(node.dataset.index));
  }

  pressed(event) {
    const node = event.target.closest(".token");
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (!node || event.altKey || event.ctrlKey || event.metaKey) return;
    const index = Number(node.dataset.index);
    if (event.key === "Enter" || event.key === " ") this.clicked(event);
    else if (step) {
      const next = Math.max(0, Math.min(this.tokens.length - 1, index + step));
      if (this.inspector.anchor) this.show(next);
      else this.node(next)?.focus();
    } else return;
    event.preventDefault();
  }

  /** One token is in the tab order: the one that had the focus last. */
  focused({ target }) {
    this.text.querySelector('[tabindex="0"]')?.setAttribute("tabindex", "-1");
    target.setAttribute("tabindex", "0");
    if (this.inspector.anchor && this.inspector.anchor !== target) this.inspector.close();
  }
}

function render({ start, tokens, text }) {
  if (tokens.length === 1 && !tokens[0].bytes) return tokenNode(tokens[0], start, [spaced(tokens[0].text)].flat());
  const parts = tokens.map((token, i) => tokenNode(token, start + i, [visible(token)], text));
  const shown = text === null ? "" : text;
  return element("span", { class: "shared" }, element("span", { class: "shared-text" }, shown), parts);
}

function tokenNode(token, index, children, part) {
  const share = probability(token);
  const of = part === undefined ? "" : part === null ? ", bytes" : `, bytes of ${part.trim()}`;
  return element(
    "span",
    {
      class: `token level-${level(share)}${part === undefined ? "" : " bytes"}`,
      role: "button",
      tabindex: "-1",
      "data-index": index,
      "aria-label": `${visible(token)}, ${percent(share)}${of}`,
      "aria-haspopup": "dialog",
      "aria-expanded": "false",
    },
    children,
  );
}

/** A text in which the ends of lines can be seen, and clicked. */
function spaced(text) {
  if (text === "") return element("span", { class: "sign" }, "∅");
  return text
    .split(/(\n)/)
    .map((part) => (part === "\n" ? [element("span", { class: "sign" }, "↵"), "\n"] : part))
    .flat();
}

/** What the colours mean. */
export function legend() {
  const steps = levelNames().map((name, i) =>
    element("li", {}, element("span", { class: `token level-${i}`, "aria-hidden": "true" }, "a"), name),
  );
  return [
    element("span", { class: "legend-title" }, "Probability"),
    element("ul", { class: "legend-steps" }, steps),
    element(
      "span",
      { class: "legend-hint" },
      "Click a token, or press Enter on it, to see what else it might have been.",
    ),
  ];
}
