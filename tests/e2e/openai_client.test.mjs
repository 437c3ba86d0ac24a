// OpenAI's own client for JavaScript, as it is published, against `jllm serve`: JLLM_URL says where.

import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.JLLM_URL}/v1`, apiKey: "unused", maxRetries: 0 });
const model = "smollm2";
const messages = [{ role: "user", content: "What is the capital of France?" }];
const asked = { model, messages, temperature: 0, max_tokens: 64 };

const schema = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 }, large: { type: "boolean" } },
  required: ["city", "large"],
  additionalProperties: false,
};
const tools = [
  {
    type: "function",
    function: { name: "weather", description: "The weather in a city.", parameters: schema, strict: true },
  },
];

/** What an asynchronous iterable gives. */
async function all(items) {
  const found = [];
  for await (const item of items) found.push(item);
  return found;
}

/** The error that this ends with. */
async function refusal(promise) {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  return assert.fail("it did not fail");
}

test("models", async () => {
  const models = await all(client.models.list());
  assert.deepEqual(models.map(({ id, object }) => [id, object]), [[model, "model"]]);
  assert.equal((await client.models.retrieve(model)).context_length, 8192);
});

test("a chat", async () => {
  const { choices, usage, object } = await client.chat.completions.create({ ...asked, logprobs: true, top_logprobs: 2 });
  const [{ message, finish_reason, logprobs }] = choices;
  assert.match(message.content, /Paris/);
  assert.deepEqual([object, message.role, finish_reason], ["chat.completion", "assistant", "stop"]);
  // The token that ends the answer has an entry, and is no part of the text.
  assert.equal(logprobs.content.map(({ token }) => token).join(""), `${message.content}<|im_end|>`);
  assert.equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);
});

test("a stream has what the whole answer has", async () => {
  const whole = await client.chat.completions.create(asked);
  const options = { ...asked, stream: true, stream_options: { include_usage: true } };
  const chunks = await all(await client.chat.completions.create(options));
  const text = chunks.map(({ choices }) => choices[0]?.delta.content ?? "").join("");
  assert.equal(text, whole.choices[0].message.content);
  assert.ok(chunks.length > 3);
  assert.equal(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);
});

test("the client's own collector of streams", async () => {
  const seen = [];
  const stream = client.chat.completions.stream(asked).on("content", (delta) => seen.push(delta));
  const { choices } = await stream.finalChatCompletion();
  assert.equal(seen.join(""), choices[0].message.content);
  assert.equal(choices[0].finish_reason, "stop");
});

test("a stream that is left", async () => {
  const stream = await client.chat.completions.create({ model, messages, max_tokens: 2000, stream: true });
  for await (const _ of stream) break;
  assert.ok(stream.controller.signal.aborted);
  assert.match((await client.chat.completions.create(asked)).choices[0].message.content, /Paris/);
});

test("tools", async () => {
  const options = { ...asked, messages: [{ role: "user", content: "How is the weather in Paris?" }], tools };
  const reply = await client.chat.completions.create({ ...options, tool_choice: "required", max_tokens: 200 });
  const [{ message, finish_reason }] = reply.choices;
  assert.equal(finish_reason, "tool_calls");
  const [call] = message.tool_calls;
  assert.deepEqual([call.type, call.function.name], ["function", "weather"]);
  const { city, large } = JSON.parse(call.function.arguments);
  assert.deepEqual([typeof city, typeof large], ["string", "boolean"]);

  // In a stream, the same call; and what it has found goes back.
  const stream = client.chat.completions.stream({ ...options, tool_choice: "required", max_tokens: 200 });
  const streamed = (await stream.finalChatCompletion()).choices[0].message;
  assert.equal(streamed.tool_calls[0].function.arguments, call.function.arguments);
  const found = { role: "tool", tool_call_id: call.id, content: "Rain, 12 degrees." };
  const next = { ...options, messages: [...options.messages, message, found], tool_choice: "none" };
  const { choices } = await client.chat.completions.create(next);
  assert.ok(choices[0].message.content.length > 0);
  assert.equal(choices[0].message.tool_calls, undefined);
});

test("tools that the client calls itself", async () => {
  const called = [];
  const look = (given) => {
    called.push(given);
    return "Rain, 12 degrees.";
  };
  const runner = client.chat.completions.runTools({
    ...asked,
    max_tokens: 200,
    tools: [{ type: "function", function: { ...tools[0].function, function: look, parse: JSON.parse } }],
    tool_choice: { type: "function", function: { name: "weather" } },
  });
  await runner.done();
  assert.equal(called.length, 1);
  assert.equal(typeof called[0].city, "string");
});

test("an answer after a schema", async () => {
  const response_format = { type: "json_schema", json_schema: { name: "place", schema, strict: true } };
  const reply = await client.chat.completions.create({ ...asked, response_format, max_tokens: 200 });
  const place = JSON.parse(reply.choices[0].message.content);
  assert.deepEqual(Object.keys(place).sort(), ["city", "large"]);
  assert.equal(typeof place.large, "boolean");
});

test("completions", async () => {
  const options = { model, prompt: ["The capital of France is", "One, two, three,"], temperature: 0, max_tokens: 5 };
  const { choices } = await client.completions.create(options);
  assert.deepEqual(choices.map(({ index }) => index), [0, 1]);
  assert.match(choices[0].text, /Paris/);
  assert.match(choices[1].text, /four/);
  const chunks = await all(await client.completions.create({ ...options, prompt: options.prompt[0], stream: true }));
  assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), choices[0].text);
});

test("embeddings", async () => {
  // The client asks for base64 by itself, and makes numbers of it.
  const input = ["The cat sat on the mat.", "A cat is sitting on a rug.", "Interest rates rose again."];
  const { data } = await client.embeddings.create({ model, input });
  const plain = await client.embeddings.create({ model, input, encoding_format: "float" });
  const dot = (a, b) => a.reduce((sum, value, at) => sum + value * b[at], 0);
  const [cat, same, other] = data.map(({ embedding }) => Array.from(embedding));
  assert.ok(Math.abs(dot(cat, cat) - 1) < 1e-4);
  assert.ok(dot(cat, same) > dot(cat, other));
  assert.ok(plain.data[0].embedding.every((value, at) => Math.abs(value - cat[at]) < 1e-6));
});

test("errors", async () => {
  const unknown = await refusal(client.chat.completions.create({ ...asked, model: "another" }));
  assert.ok(unknown instanceof OpenAI.NotFoundError);
  assert.deepEqual([unknown.status, unknown.code], [404, "model_not_found"]);
  const wrong = await refusal(client.chat.completions.create({ ...asked, temperature: "hot" }));
  assert.ok(wrong instanceof OpenAI.BadRequestError);
  assert.equal(wrong.param, "temperature");
  assert.match(wrong.requestID, /^req_/);
  const long = await refusal(client.completions.create({ model, prompt: "one ".repeat(9000), stream: true }));
  assert.deepEqual([long.status, long.code], [400, "context_length_exceeded"]);
  const large = await refusal(client.completions.create({ model, prompt: "x".repeat(20_000_000) }));
  assert.deepEqual([large.status, large.code], [413, "request_too_large"]);
});
