// Message composer: Enter sends, and the button stops a running answer.

import { byId } from "./element.js";

export class Composer {
  /**
   * @param {import("./chat.js").Chat} chat
   * @param {() => {text: string, field: HTMLElement} | null} problem what keeps from asking
   */
  constructor(chat, problem) {
    this.chat = chat;
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
    this.prompt.addEventListener("input", () => this.resize());
  }

  send() {
    const problem = this.problem();
    this.hint.classList.toggle("wrong", problem !== null);
    this.hint.replaceChildren(...(problem ? [problem.text] : this.usual));
    if (problem) problem.field.focus();
    else if (this.chat.send(this.prompt.value)) this.prompt.value = "";
    this.resize();
  }

  /** Make the button fit what it would do. */
  update() {
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
