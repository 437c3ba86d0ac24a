// Sampling parameters form. An empty field is not sent, so that the server's default holds.

import { defaultText, defaultsNote } from "./defaults.js";
import { byId, element } from "./element.js";

const REPETITION = "above 1, less is said again";
const FIELDS = [
  { name: "temperature", label: "Temperature", hint: "0 takes the most probable token", step: 0.1, min: 0 },
  { name: "top_p", label: "Top-p", hint: "the likeliest that sum to this", step: 0.05, min: 0, max: 1, above: true },
  { name: "top_k", label: "Top-k", hint: "the k likeliest; 0 keeps all", step: 1, min: 0, whole: true },
  { name: "min_p", label: "Min-p", hint: "of the likeliest one’s probability", step: 0.05, min: 0, max: 1 },
  { name: "repetition_penalty", label: "Repetition penalty", hint: REPETITION, step: 0.05, min: 0.01, max: 100 },
  { name: "max_tokens", label: "Max tokens", hint: "then the answer ends", step: 1, min: 1, whole: true },
  { name: "seed", label: "Seed", hint: "the same seed, the same text", step: 1, min: 0, max: Number.MAX_SAFE_INTEGER, whole: true },
];
const THINKING = { "": "As the model has it", on: "On", off: "Off" };

export class Parameters {
  constructor(store) {
    this.store = store;
    this.form = byId("parameters");
    const reset = element("button", { type: "button", class: "text-button", onclick: () => this.reset() }, "Reset");
    const title = element("h2", { class: "caption", id: "parameters-title" }, "Parameters");
    this.note = element("p", { class: "field-hint" });
    this.form.append(
      element("div", { class: "panel-head" }, title, reset),
      this.note,
      ...FIELDS.map(numberField),
      thinkingField(),
      systemField(),
    );
    this.fill(store.setting("parameters", {}));
    this.fit(null);
    this.form.addEventListener("input", () => this.changed());
    this.form.addEventListener("submit", (event) => event.preventDefault());
  }

  fill(values) {
    for (const { name } of FIELDS) this.form.elements[name].value = values[name] ?? "";
    this.form.elements.thinking.value = values.thinking ?? "";
    this.form.elements.system.value = values.system ?? "";
  }

  reset() {
    this.fill({});
    this.changed();
  }

  changed() {
    for (const field of FIELDS)
      this.form.elements[field.name].setAttribute("aria-invalid", String(wrong(field, this.form) !== null));
    this.store.set("parameters", Object.fromEntries(new FormData(this.form)));
    this.showDefaults();
  }

  /**
   * Fit the form to a model: its defaults, and whether its thinking can be turned on and off. To others, the question
   * would be an error.
   *
   * @param {object | null} card what the server tells of the model
   */
  fit(card) {
    this.defaults = card?.default_sampling;
    const variables = card?.abilities?.chat_template_kwargs;
    this.form.querySelector(".choices").hidden = variables !== undefined && !variables.includes("enable_thinking");
    this.note.textContent = defaultsNote(this.defaults);
    this.showDefaults();
  }

  showDefaults() {
    for (const { name } of FIELDS)
      this.form.elements[name].placeholder = defaultText(name, this.defaults, this.thinking !== "off");
  }

  /** "on", "off", or "" where the model has its own way. */
  get thinking() {
    return this.form.querySelector(".choices").hidden ? "" : this.form.elements.thinking.value;
  }

  /** The first field that is not as it must be, or null. */
  problem() {
    for (const field of FIELDS) {
      const text = wrong(field, this.form);
      if (text) return { text, field: this.form.elements[field.name] };
    }
    return null;
  }

  get system() {
    return this.form.elements.system.value.trim();
  }

  /** The fields of a request. */
  values() {
    const given = FIELDS.filter(({ name }) => this.form.elements[name].value !== "");
    const values = Object.fromEntries(given.map(({ name }) => [name, this.form.elements[name].valueAsNumber]));
    const { thinking } = this;
    return thinking ? { ...values, chat_template_kwargs: { enable_thinking: thinking === "on" } } : values;
  }
}

/** What is wrong with a field: "Top-p must be above 0 and at most 1". */
function wrong({ name, label, min, max, above, whole }, form) {
  const { valueAsNumber: value, validity, value: text } = form.elements[name];
  if (text === "" && !validity.badInput) return null;
  const low = above ? value > min : value >= min;
  if (low && !(value > max) && (!whole || Number.isInteger(value))) return null;
  const kind = whole ? "a whole number, " : "";
  const from = above ? `above ${min}` : `${min} or above`;
  return `${label} must be ${kind}${max === undefined ? from : `${from} and at most ${max}`}`;
}

function numberField({ name, label, hint, step, min, max, whole }) {
  const attributes = {
    type: "number",
    name,
    id: `field-${name}`,
    step,
    min,
    max,
    inputmode: whole ? "numeric" : "decimal",
  };
  const input = element("input", {
    ...attributes,
    "aria-describedby": `hint-${name}`,
    autocomplete: "off",
  });
  const title = element("label", { for: `field-${name}` }, label);
  const text = element("div", {}, title, element("p", { class: "field-hint", id: `hint-${name}` }, hint));
  return element("div", { class: "field-row" }, text, input);
}

function thinkingField() {
  const choices = Object.entries(THINKING).map(([value, label]) =>
    element(
      "label",
      { class: "choice" },
      element("input", { type: "radio", name: "thinking", value, class: "hidden" }),
      element("span", {}, label),
    ),
  );
  return element(
    "fieldset",
    { class: "choices" },
    element("legend", {}, "Thinking"),
    element("div", { class: "choice-row" }, choices),
  );
}

function systemField() {
  const area = element("textarea", {
    id: "field-system",
    name: "system",
    class: "field system",
    rows: "4",
    placeholder: "None",
  });
  return element("div", { class: "system-field" }, element("label", { for: "field-system" }, "System message"), area);
}
