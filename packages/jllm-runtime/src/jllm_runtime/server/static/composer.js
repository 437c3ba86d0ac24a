// Message composer: Enter sends, and the button stops a running answer. What is not sent stays with its conversation.

import { byId } from "./element.js";

export class Composer {
  /**
   * @param {import("./chat.js").Chat} chat
   * @param {import("./drafts.js").Drafts} drafts
   * @param {() => {text: string, field: HTMLElement} | null} problem what keeps from asking
   */
  constructor(chat, drafts, problem) {
    this.chat = chat;
    this.drafts = drafts;
    this.key = null; // of the draft that is shown
    this.problem = problem;
    this.prompt = byId("prompt");
    this.button = byId("send");
    this.hint = byId("composer-hint");
    this.usual = [...this.hint.childNodes];
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (!chat.stop()) this.send();
    });
    this.prompt.addEventListener("keydown", (event) => {
      // While an input method composes, Enter is its own.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    this.prompt.addEventListener("input", () => {
      drafts.set(this.key, this.prompt.value);
      this.resize();
    });
  }

  /** Tell what keeps from asking, if anything does, and go there; tells whether something does. */
  blocked() {
    const problem = this.problem();
    this.hint.classList.toggle("wrong", problem !== null);
    this.hint.replaceChildren(...(problem ? [problem.text] : this.usual));
    problem?.field.focus();
    return problem !== null;
  }

  send() {
    if (!this.blocked() && this.chat.send(this.prompt.value)) this.show();
  }

  /** Show what was typed in the conversation that is open. */
  show() {
    this.key = this.chat.key;
    this.prompt.value = this.drafts.get(this.key) ?? "";
    this.resize();
  }

  /** Make the text fit the conversation that is open, and the button what it would do. */
  update() {
    if (this.chat.key !== this.key) this.show();
    const { streaming } = this.chat;
    this.button.setAttribute("aria-label", streaming ? "Stop" : "Send");
    byId("send-icon").setAttribute("href", streaming ? "#icon-stop" : "#icon-send");
  }

  resize() {
    if (CSS.supports("field-sizing", "content")) return; // the style sheet does it
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${this.prompt.scrollHeight}px`;
  }
}
