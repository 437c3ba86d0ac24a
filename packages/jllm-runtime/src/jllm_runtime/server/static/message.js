// Answer view.

import { summary } from "./answer.js";
import { element } from "./element.js";
import { Glass } from "./glass.js";
import { Markdown, canCopy, copyText } from "./markdown.js";

/** What the model says, while it does and after. */
export class AnswerView {
  /**
   * @param {object} answer see answer.js
   * @param {{inspector: object, onregenerate: () => void}} options
   */
  constructor(answer, { inspector, onregenerate }) {
    this.answer = answer;
    this.body = new TextView("prose", "Tokens of the answer", inspector);
    this.reasoning = new TextView("prose thoughts-text", "Tokens of the reasoning", inspector);
    this.thinking = element("summary");
    this.thoughts = element("details", { class: "thoughts", hidden: true }, this.thinking, this.reasoning.element);
    this.thoughts.addEventListener("toggle", () => this.showReasoning());
    this.problem = element("div", { class: "problem", role: "alert", hidden: true });
    this.copy = element(
      "button",
      { type: "button", class: "text-button", onclick: () => copyText(answer.content, this.copy) },
      "Copy",
    );
    this.again = element("button", { type: "button", class: "text-button", onclick: onregenerate }, "Regenerate");
    this.note = element("span", { class: "answer-note" });
    const foot = element("div", { class: "answer-foot" }, this.copy, this.again, this.note);
    const heading = element("h3", { class: "hidden" }, "Answer");
    this.element = element(
      "li",
      { class: "message answer" },
      heading,
      this.thoughts,
      this.body.element,
      this.problem,
      foot,
    );
  }

  /** Show the answer as it is now. `last` says that nothing follows it, so it can be made again, or be under way. */
  update({ busy, glass, last }) {
    const { answer } = this;
    const streaming = busy && last;
    this.state = { streaming, glass };
    this.element.classList.toggle("streaming", streaming);
    this.thoughts.hidden = !answer.reasoning;
    if (answer.reasoning) this.thinking.textContent = thinking(answer, streaming);
    this.showReasoning();
    this.body.set(answer.content, answer.tokens, glass, streaming && !(answer.reasoning && !answer.content));
    this.body.element.hidden = !streaming && !answer.content;
    this.showProblem();
    this.copy.hidden = streaming || !answer.content || !canCopy();
    this.again.hidden = streaming || !last;
    this.again.textContent = answer.error ? "Try again" : "Regenerate";
    this.note.textContent = note(answer, streaming, glass);
    this.note.classList.toggle("cut", answer.finish === "length");
  }

  /** The answer as it is read out. */
  get spoken() {
    return this.body.spoken || this.answer.content;
  }

  showReasoning() {
    if (!this.thoughts.open || !this.state) return; // folded, it costs nothing
    const { content, reasoning, thoughtTokens } = this.answer;
    this.reasoning.set(reasoning, thoughtTokens, this.state.glass, this.state.streaming && !content);
  }

  showProblem() {
    const { error } = this.answer;
    this.problem.hidden = !error;
    if (!error || this.problem.hasChildNodes()) return;
    const title = error.status ? `The server refused (${error.status})` : "No answer";
    this.problem.append(element("strong", {}, error.status === 200 ? "The answer failed" : title), error.message);
  }
}

/** A text, as Markdown or in the glass box. */
class TextView {
  constructor(className, label, inspector) {
    this.element = element("div");
    this.prose = element("div", { class: className });
    this.markdown = new Markdown(this.prose);
    this.makeGlass = () => new Glass(inspector, label);
    this.glass = null;
  }

  set(text, tokens, glass, open) {
    const inGlass = glass && tokens.length > 0;
    if (inGlass) this.glass ??= this.makeGlass();
    const child = inGlass ? this.glass.element : this.prose;
    if (this.element.firstChild !== child) this.element.replaceChildren(child);
    if (inGlass) this.glass.set(tokens);
    else this.markdown.set(text, open);
  }

  /** What Markdown has made of the text, without its buttons; nothing in the glass box. */
  get spoken() {
    if (this.element.firstChild !== this.prose) return "";
    const copy = this.prose.cloneNode(true);
    for (const bar of copy.querySelectorAll(".code-bar")) bar.remove();
    return [...copy.children].map((block) => block.textContent).join("\n");
  }
}

function thinking({ content, began, thought, ended }, streaming) {
  if (streaming && !content) return "Thinking…";
  const seconds = ((thought ?? ended ?? began) - began) / 1000;
  return seconds > 0 ? `Thought for ${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s` : "Thoughts";
}

function note(answer, streaming, glass) {
  if (streaming) return "Answering…";
  const missing = glass && answer.content && !answer.tokens.length;
  const parts = [summary(answer), missing && "no probabilities: the glass box was off"];
  return parts.filter(Boolean).join(", ");
}
