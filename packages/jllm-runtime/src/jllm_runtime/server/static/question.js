// Question view: what the reader said, the form to say it in other words, and the way to its other versions.

import { element, icon } from "./element.js";
import { place } from "./versions.js";

export class QuestionView {
  /**
   * @param {object} message
   * @param {object} options
   * @param {{get: () => string | null, set: (text: string) => void, forget: () => void}} options.draft of the form
   * @param {(text: string) => boolean} options.onedit tells whether it was asked
   * @param {(which: number, step: number) => void} options.onversion `step` is the way there, -1 or 1
   */
  constructor(message, options) {
    this.message = message;
    this.busy = false;
    this.options = options;
    this.pencil = element(
      "button",
      { type: "button", class: "icon-button edit", "aria-label": "Edit the question", onclick: () => this.edit() },
      icon("edit"),
    );
    this.text = element("div", { class: "question-text" }, message.content);
    this.line = element("div", { class: "question-line" }, this.pencil, this.text);
    this.form = editForm(this);
    this.versions = versionsOf(message, options.onversion);
    const heading = element("h3", { class: "hidden" }, "You");
    this.element = element("li", { class: "message question" }, heading, this.line, this.form, this.versions);
    const draft = options.draft.get();
    if (draft !== null) this.open(draft);
  }

  get editing() {
    return !this.form.hidden;
  }

  /** Nothing is changed while an answer is under way. */
  update({ busy }) {
    this.busy = busy;
    this.pencil.disabled = busy;
    this.versions.hidden = busy || this.editing || place(this.message)[1] < 2;
  }

  edit() {
    this.open(this.message.content);
    this.options.draft.set(this.message.content);
    const { field } = this.form.elements;
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }

  open(text) {
    this.form.elements.field.value = text;
    this.show(true);
  }

  cancel() {
    this.options.draft.forget();
    this.show(false);
    this.pencil.focus();
  }

  send() {
    this.options.onedit(this.form.elements.field.value);
  }

  show(editing) {
    this.form.hidden = !editing;
    this.line.hidden = editing;
    this.update(this);
  }

  /** Put the focus on the button that leads to the version before (-1) or after (1) this one. */
  focusVersion(step) {
    this.versions.querySelector(`[data-step="${step}"]`)?.focus();
  }
}

function editForm(view) {
  const field = element("textarea", {
    name: "field",
    class: "field edit-field",
    rows: "2",
    "aria-label": "The question in other words",
    oninput: () => view.options.draft.set(field.value),
    onkeydown: (event) => {
      if (event.isComposing || !(event.key === "Escape" || (event.key === "Enter" && !event.shiftKey))) return;
      event.preventDefault();
      if (event.key === "Enter") view.send();
      else view.cancel();
    },
  });
  const cancel = element("button", { type: "button", class: "text-button", onclick: () => view.cancel() }, "Cancel");
  const send = element("button", { type: "submit", class: "main-button" }, "Ask this");
  const onsubmit = (event) => {
    event.preventDefault();
    view.send();
  };
  const hint = element("p", { class: "field-hint" }, "What followed is kept as an earlier version.");
  const foot = element("div", { class: "edit-foot" }, hint, cancel, send);
  return element("form", { class: "edit-form", hidden: true, novalidate: true, onsubmit }, field, foot);
}

/** "‹ 2 of 3 ›": goes round, so that no button is ever out of use under the focus. */
function versionsOf(message, onversion) {
  const [shown, count] = place(message);
  const button = (step, label, name) =>
    element(
      "button",
      {
        type: "button",
        class: "icon-button",
        "aria-label": label,
        "data-step": step,
        onclick: () => onversion((shown + step + count) % count, step),
      },
      icon(name),
    );
  return element(
    "div",
    { class: "versions", role: "group", "aria-label": "Versions of the question", hidden: true },
    button(-1, "Earlier version", "left"),
    element("span", {}, `${shown + 1} of ${count}`),
    button(1, "Later version", "right"),
  );
}
