// Chat controller: sending, streaming, and the messages on the page.

import { absorb, newAnswer, requestMessages } from "./answer.js";
import { ApiError } from "./api.js";
import { byId } from "./element.js";
import { AnswerView, question } from "./message.js";
import { newConversation } from "./store.js";

const KEEP_EVERY = 1000; // milliseconds between two writes of an answer that grows

export class Chat {
  /**
   * @param {object} parts of the page: api, store, models, parameters, inspector, follower, announce
   * @param {() => void} onchange called when there is another list of conversations, or another one is shown
   */
  constructor(parts, onchange) {
    Object.assign(this, parts);
    this.onchange = onchange;
    this.list = byId("messages");
    this.running = new Map(); // id of a conversation -> {conversation, controller, kept}
    this.glass = false;
    this.frame = null;
    this.conversation = newConversation();
    this.views = [];
    addEventListener("pagehide", () => this.leave());
  }

  get streaming() {
    return this.running.has(this.conversation.id);
  }

  /** Show a conversation, or a new one. An answer that is under way goes on, seen or not. */
  open(id) {
    this.inspector.close();
    this.conversation = this.running.get(id)?.conversation ?? (id && this.store.conversation(id)) ?? newConversation();
    this.views = [];
    this.list.replaceChildren();
    for (const message of this.conversation.messages) this.add(message);
    this.update();
    this.follower.follow();
    this.onchange();
  }

  setGlass(on) {
    this.inspector.close();
    this.glass = on;
    this.update();
  }

  /** Ask. Tells whether it was asked. */
  send(text) {
    if (!text.trim() || this.streaming) return false;
    const { conversation } = this;
    const message = { role: "user", content: text.trim() };
    conversation.title ||= message.content.replace(/\s+/g, " ").slice(0, 80);
    conversation.messages.push(message);
    this.add(message);
    this.answer(conversation);
    return true;
  }

  /** Stop the answer that is under way; tells whether there was one. */
  stop() {
    this.running.get(this.conversation.id)?.controller.abort();
    return this.streaming;
  }

  /** The page goes away, and with it what is under way. */
  leave() {
    for (const { conversation, controller } of this.running.values()) {
      controller.abort();
      this.store.keep(conversation);
    }
  }

  regenerate() {
    if (this.streaming) return;
    this.inspector.close();
    this.conversation.messages.pop();
    this.views.pop();
    this.list.lastChild.remove();
    this.answer(this.conversation);
  }

  /** Forget a conversation, and what is under way in it. */
  forget(id) {
    this.running.get(id)?.controller.abort();
    this.running.delete(id);
    this.store.forget(id);
    if (id === this.conversation.id) this.open(null);
    else this.onchange();
  }

  async answer(conversation) {
    const controller = new AbortController();
    const answer = newAnswer(this.models.current);
    const run = { conversation, controller, kept: Date.now() };
    const messages = requestMessages(conversation, this.parameters.system);
    conversation.messages.push(answer);
    conversation.changed = Date.now();
    this.running.set(conversation.id, run);
    this.add(answer);
    this.store.keep(conversation);
    this.update();
    this.follower.follow();
    this.onchange();
    this.announce("Answering");
    try {
      await this.stream(run, answer, messages);
    } catch (error) {
      fail(answer, error, controller.signal);
    }
    this.finish(run, answer);
  }

  async stream(run, answer, messages) {
    answer.model = await this.models.ready();
    const request = {
      model: answer.model,
      messages,
      ...this.parameters.values(),
      stream_options: { include_usage: true },
    };
    if (this.glass) Object.assign(request, { logprobs: true, top_logprobs: 10 });
    for await (const chunk of this.api.complete(request, run.controller.signal)) {
      absorb(answer, chunk);
      if (run.conversation === this.conversation) this.schedule();
      if (Date.now() - run.kept < KEEP_EVERY) continue;
      run.kept = Date.now();
      this.store.keep(run.conversation);
    }
  }

  finish(run, answer) {
    const { conversation } = run;
    answer.ended = Date.now();
    if (this.running.get(conversation.id) !== run) return; // it was forgotten meanwhile
    this.running.delete(conversation.id);
    conversation.changed = Date.now();
    const kept = this.store.keep(conversation);
    if (conversation === this.conversation) {
      this.update();
      const { spoken } = this.views.at(-1);
      if (!answer.error) this.announce(answer.finish === "stopped" ? "Stopped" : `Answer: ${spoken}`);
    }
    if (!kept) this.announce("The browser has no room left to keep this conversation.");
    this.onchange();
  }

  add(message) {
    byId("opening").hidden = true;
    if (message.role === "user") {
      this.list.append(question(message));
      return;
    }
    const view = new AnswerView(message, {
      inspector: this.inspector,
      onregenerate: () => {
        byId("prompt").focus();
        this.regenerate();
      },
    });
    this.views.push(view);
    this.list.append(view.element);
  }

  /** Show, before the next picture, what has come. */
  schedule() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (this.streaming) this.show(this.views.at(-1));
    });
  }

  show(view) {
    const last = view.answer === this.conversation.messages.at(-1);
    view.update({ streaming: last && this.streaming, glass: this.glass, last });
    this.follower.grown();
  }

  update() {
    byId("opening").hidden = this.conversation.messages.length > 0;
    for (const view of this.views) this.show(view);
  }
}

function fail(answer, error, signal) {
  if (signal.aborted) {
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
