// Markdown inline renderer: emphasis, code, links, line breaks. HTML in the text stays text.

import { element } from "./element.js";
import { asText, emphasise, newMark } from "./emphasis.js";

const LONGEST = 50_000; // a paragraph beyond this is shown as it stands

/**
 * @param {string} text
 * @param {boolean} open whether more may follow: what is begun at the end is shown as if it were closed
 * @returns {(Node | string)[]}
 */
export function inline(text, open = false) {
  return text.length > LONGEST ? [text] : new Inline(text, open).parse();
}

/** The address as a URL, or null where it is not one of http or https. */
export function safeUrl(address) {
  try {
    const url = new URL(address);
    return url.protocol === "https:" || url.protocol === "http:" ? url.href : null;
  } catch {
    return null;
  }
}

class Inline {
  constructor(text, open) {
    this.text = text;
    this.open = open;
    this.at = 0;
    this.parts = []; // strings, nodes, and marks: runs of * _ ~ that may turn out to be emphasis
    this.brackets = []; // the "[" that wait for their "]", as indices into parts
  }

  parse() {
    while (this.at < this.text.length) {
      const rule = RULES[this.text[this.at]];
      if (!rule || !this[rule]()) this.plain();
    }
    emphasise(this.parts, 0, this.open);
    return this.parts.map(asText);
  }

  /** Everything up to the next character that may mean something, or that one where it means nothing. */
  plain() {
    SPECIAL.lastIndex = this.at + 1;
    const end = SPECIAL.exec(this.text)?.index ?? this.text.length;
    this.parts.push(this.text.slice(this.at, end));
    this.at = end;
  }

  match(pattern) {
    pattern.lastIndex = this.at;
    return pattern.exec(this.text);
  }

  escape() {
    const next = this.text[this.at + 1];
    if (next === undefined || !/[!-/:-@[-`{-~]/.test(next)) return false;
    this.parts.push(next);
    this.at += 2;
    return true;
  }

  lineBreak() {
    this.parts.push(element("br"));
    this.at += 1;
    return true;
  }

  code() {
    const run = this.match(/`+/y)[0];
    const start = this.at + run.length;
    let end = closing(this.text, run.length, start);
    if (end < 0 && !this.open) {
      this.parts.push(run);
      this.at = start;
      return true;
    }
    if (end < 0) end = this.text.length;
    const inside = this.text.slice(start, end).replaceAll("\n", " ");
    if (inside) this.parts.push(element("code", {}, inside.replace(/^ (.*[^ ].*) $/, "$1")));
    this.at = end + run.length;
    return true;
  }

  mark() {
    const run = this.match(/\*+|_+|~+/y)[0];
    const end = this.at + run.length;
    const after = end < this.text.length ? String.fromCodePoint(this.text.codePointAt(end)) : " ";
    const mark = newMark(run, characterBefore(this.text, this.at), after);
    const last = this.open && end === this.text.length; // what it is will be seen with the next character
    if (!mark) this.parts.push(run);
    else if (!last || mark.closes) this.parts.push(mark);
    this.at = end;
    return true;
  }

  openBracket() {
    this.brackets.push(this.parts.length);
    this.parts.push(this.text[this.at] === "!" ? "![" : "[");
    this.at += this.text[this.at] === "!" ? 2 : 1;
    return true;
  }

  image() {
    return this.text[this.at + 1] === "[" && this.openBracket();
  }

  closeBracket() {
    const start = this.brackets.pop();
    if (start === undefined) return false;
    this.at += 1;
    const found = this.match(/\(\s*(<[^<>\n]*>|[^\s()]*(?:\([^\s()]*\)[^\s()]*)*)(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/y);
    const url = found && safeUrl(found[1].replace(/^<|>$/g, ""));
    const unfinished = !found && this.open && this.match(/\((?:[^\s()]|\([^\s()]*\))*$/y);
    if (!url && !unfinished) {
      this.at -= 1;
      return false;
    }
    emphasise(this.parts, start + 1, this.open);
    const inside = this.parts.splice(start).slice(1);
    const children = inside.map(asText);
    if (url) this.parts.push(link(url, children.length ? children : [url]));
    else this.parts.push(...children);
    if (url) this.brackets = []; // no link in a link
    this.at += (found ?? unfinished)[0].length;
    return true;
  }

  angle() {
    const newline = this.match(/<br\s*\/?>/iy);
    if (newline) {
      this.parts.push(element("br"));
      this.at += newline[0].length;
      return true;
    }
    const found = this.match(/<(https?:\/\/[^\s<>]+)>/iy);
    const url = found && safeUrl(found[1]);
    if (!url) return false;
    this.parts.push(link(url, [found[1]]));
    this.at += found[0].length;
    return true;
  }

  address() {
    if (this.brackets.length || /\w/.test(this.text[this.at - 1] ?? " ")) return false;
    const found = this.match(/https?:\/\/[^\s<>"`]+/y);
    if (!found) return false;
    const shown = withoutTail(found[0]);
    const url = safeUrl(shown);
    if (!url) return false;
    this.parts.push(link(url, [shown]));
    this.at += shown.length;
    return true;
  }
}

const RULES = {
  "\\": "escape",
  "\n": "lineBreak",
  "`": "code",
  "*": "mark",
  _: "mark",
  "~": "mark",
  "[": "openBracket",
  "!": "image",
  "]": "closeBracket",
  "<": "angle",
  h: "address",
};
const SPECIAL = /[\\\n`*_~[!\]<]|h(?=ttps?:\/\/)/g;

function characterBefore(text, at) {
  const pair = at > 1 && /[\uDC00-\uDFFF]/.test(text[at - 1]);
  return at ? text.slice(at - (pair ? 2 : 1), at) : " ";
}

function link(url, children) {
  return element("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

/** Where the next run of exactly `length` backticks begins, or -1. */
function closing(text, length, from) {
  const runs = /`+/g;
  runs.lastIndex = from;
  for (let run = runs.exec(text); run; run = runs.exec(text)) if (run[0].length === length) return run.index;
  return -1;
}

/** An address without what belongs to the sentence around it: final punctuation, a bracket that it does not open. */
function withoutTail(address) {
  for (;;) {
    const last = address.at(-1);
    const loose = last === ")" && address.split(")").length > address.split("(").length;
    if (!loose && !".,:;!?'*_~]".includes(last)) return address;
    address = address.slice(0, -1);
  }
}
