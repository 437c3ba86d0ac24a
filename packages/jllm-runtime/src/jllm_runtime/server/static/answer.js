// Streamed message: the deltas of a stream's chunks, added up.

import { ApiError } from "./api.js";
import { token } from "./token.js";

/** A message of the model's before anything has come. It is plain data, kept as it is. */
export function newAnswer(model) {
  return {
    role: "assistant",
    model,
    content: "",
    reasoning: "",
    tokens: [], // of `content`, where probabilities were asked for
    thoughtTokens: [], // of `reasoning`
    finish: null, // "stop", "length", ...; "stopped" by the reader, "error"
    error: null, // {message, status}
    usage: null,
    began: Date.now(),
    firstToken: null,
    thought: null, // when the reasoning ended
    ended: null,
  };
}

/** Put one chunk of the stream into the answer. */
export function absorb(answer, chunk) {
  if (chunk.usage) answer.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const { reasoning_content: reasoning, content } = choice.delta ?? {};
  if (reasoning) answer.reasoning += reasoning;
  if (content) answer.content += content;
  if (reasoning || content) answer.firstToken ??= Date.now();
  if (content && answer.reasoning) answer.thought ??= Date.now();
  // A chunk may bring tokens and no text yet: half a character, or what may become a stop. They go where the text is.
  const thinking = reasoning ? !content : answer.reasoning && !answer.content;
  const tokens = (choice.logprobs?.content ?? []).map(token);
  (thinking ? answer.thoughtTokens : answer.tokens).push(...tokens);
  if (choice.finish_reason) answer.finish = choice.finish_reason;
}

/** End the answer with an error, or with the reader's stop. */
export function fail(answer, error, stopped) {
  if (stopped) {
    answer.finish = "stopped";
    return;
  }
  answer.finish = "error";
  const known = error instanceof ApiError;
  answer.error = {
    message: known ? error.message : `This page failed: ${error.message}`,
    status: known ? error.status : 0,
  };
}

/** What became of the answer, in a line: "57 tokens, 24 a second", "cut at 60 tokens, 24 a second". */
export function summary(answer) {
  const parts = [];
  const count = answer.usage?.completion_tokens;
  if (count) {
    const cut = answer.finish === "length" ? "cut at " : "";
    parts.push(`${cut}${count.toLocaleString("en")} ${count === 1 ? "token" : "tokens"}`);
    const seconds = (answer.ended - answer.firstToken) / 1000;
    if (count > 1 && seconds > 0) parts.push(`${rate((count - 1) / seconds)} a second`);
  }
  if (answer.finish === "stopped" || answer.finish === null) parts.push("stopped"); // null: the page was left meanwhile
  return parts.join(", ");
}

function rate(value) {
  return value < 100 ? value.toFixed(1) : Math.round(value).toLocaleString("en");
}

/** The messages of a conversation as the API takes them. Answers that failed before their first word are left out. */
export function requestMessages(conversation, system) {
  const said = conversation.messages.filter((message) => message.content);
  const messages = said.map(({ role, content }) => ({ role, content }));
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}
