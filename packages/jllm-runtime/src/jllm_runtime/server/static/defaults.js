// Default of a parameter: what holds for an empty field.

// Of parameters that have it, the value with which they do nothing.
const OFF = { top_k: 0, top_p: 1, min_p: 0, repetition_penalty: 1, presence_penalty: 0, frequency_penalty: 0 };
const UNSHOWN = ["presence_penalty", "frequency_penalty"]; // those without a field

/**
 * "0.6", "greedy", "off", "2048", as the empty field shows it; "auto" where the server does not tell.
 *
 * @param {object | undefined} defaults `default_sampling` of the model's card
 * @param {boolean} thinking whether the model may think before it answers
 */
export function defaultText(name, defaults, thinking) {
  if (name === "seed") return "random";
  if (name === "max_tokens" && !thinking) name = "max_tokens_without_thinking";
  const value = defaults?.[name];
  if (value === undefined || value === null) return "auto";
  if (name === "temperature" && value === 0) return "greedy";
  return value === OFF[name] ? "off" : String(value);
}

/** Whose defaults they are, and those that have no field, in a sentence. */
export function defaultsNote(defaults) {
  if (!defaults) return "An empty field has the server’s default.";
  const others = UNSHOWN.filter((name) => (defaults[name] ?? OFF[name]) !== OFF[name]);
  const also = others.map((name) => `, ${name.replace("_", " ")} ${defaults[name]}`).join("");
  return `An empty field has the ${defaults.source ? "setting of the model’s publisher" : "server’s default"}${also}.`;
}
