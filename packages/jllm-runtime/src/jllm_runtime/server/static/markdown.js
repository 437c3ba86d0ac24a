// Incremental Markdown view: the text grows at its end, and only the blocks that change are made anew.

import { blocks } from "./blocks.js";
import { element } from "./element.js";
import { inline } from "./inline.js";

export class Markdown {
  /** @param {HTMLElement} root what to fill */
  constructor(root) {
    this.root = root;
    this.shown = []; // {source, block, node}
  }

  /** Show a text. Set `open` while more of it may come. */
  set(text, open = false) {
    const lines = untab(text.split(/\r\n|\r|\n/));
    const found = blocks(lines, open);
    found.forEach((block, i) => {
      const last = open && i === found.length - 1;
      const source = `${last ? "open" : ""}${lines.slice(block.from, block.to).join("\n")}`;
      const old = this.shown[i];
      if (old?.source === source) return;
      const node = (old && patch(old, block)) || render(block, last);
      if (node !== old?.node) old ? old.node.replaceWith(node) : this.root.append(node);
      this.shown[i] = { source, block, node };
    });
    for (const { node } of this.shown.splice(found.length)) node.remove();
  }
}

/** Tabs that indent, as spaces; those in code stay. */
function untab(lines) {
  let code = false;
  return lines.map((line) => {
    if (/^\s*(```|~~~)/.test(line)) code = !code;
    return code ? line : line.replace(/^[ \t]+/, (indent) => indent.replaceAll("\t", "    "));
  });
}

/** Code that grows keeps its element, and so its scroll position and its button's focus. */
function patch(old, block) {
  if (old.block.type !== "code" || block.type !== "code" || old.block.language !== block.language) return null;
  old.node.querySelector("code").textContent = block.text;
  return old.node;
}

function render(block, open) {
  return RENDER[block.type](block, open);
}

const RENDER = {
  paragraph: ({ text }, open) => element("p", {}, inline(text, open)),
  // Two levels are the page's own, and one the message's.
  heading: ({ level, text }, open) => element(`h${Math.min(6, level + 3)}`, {}, inline(text, open)),
  rule: () => element("hr"),
  quote: ({ children }, open) => element("blockquote", {}, renderAll(children, open)),
  code: renderCode,
  list: renderList,
  table: renderTable,
};

function renderAll(children, open) {
  return children.map((child, i) => render(child, open && i === children.length - 1));
}

function renderCode({ language, text }) {
  const code = element("code", {}, text);
  const copy = element(
    "button",
    { type: "button", class: "text-button", onclick: () => copyText(code.textContent, copy) },
    "Copy",
  );
  const bar = element("div", { class: "code-bar" }, element("span", {}, language), canCopy() && copy);
  return element("div", { class: "code" }, bar, element("pre", { tabindex: "0" }, code));
}

function renderList({ start, items, loose }, open) {
  const rendered = items.map((children, i) => {
    const last = open && i === items.length - 1;
    const [first, ...others] = children;
    if (loose || first?.type !== "paragraph") return element("li", {}, renderAll(children, last));
    return element("li", {}, inline(first.text, last && !others.length), renderAll(others, last));
  });
  const first = start === null || start === 1 ? null : start;
  return element(start === null ? "ul" : "ol", { start: first }, rendered);
}

function renderTable({ head, align, rows }, open) {
  const cell = (tag, row, last) => (text, i) => {
    const attributes = { class: align[i] && `align-${align[i]}`, scope: tag === "th" ? "col" : null };
    return element(tag, attributes, inline(text, last));
  };
  const line = (tag, last) => (row) => element("tr", {}, row.map(cell(tag, row, last)));
  const body = rows.map((row, i) => line("td", open && i === rows.length - 1)(row));
  const table = element(
    "table",
    {},
    element("thead", {}, line("th", open && !rows.length)(head)),
    element("tbody", {}, body),
  );
  return element("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, table);
}

/** Browsers give the clipboard to secure origins only. */
export function canCopy() {
  return Boolean(navigator.clipboard);
}

/** Copy a text, and say so on the button for a moment. */
export async function copyText(text, button) {
  const label = button.textContent;
  button.textContent = await navigator.clipboard.writeText(text).then(
    () => "Copied",
    () => "Not allowed",
  );
  setTimeout(() => (button.textContent = label), 1500);
}
