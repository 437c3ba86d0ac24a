// Chat controller: sending, streaming, and the messages on the page.

import { absorb, fail, newAnswer, requestMessages } from "./answer.js";
import { byId } from "./element.js";
import { AnswerView } from "./message.js";
import { QuestionView } from "./question.js";
import { newConversation } from "./store.js";
import { addVersion, place, showVersion } from "./versions.js";

const KEEP_EVERY = 1000; // milliseconds between two writes of an answer that grows

export class Chat {
  /**
   * @param {object} parts of the page: api, store, drafts, models, parameters, inspector, follower, announce, and
   *   `blocked`, which tells whether a parameter keeps from asking
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
    this.views = []; // of its messages
    addEventListener("pagehide", () => this.leave());
  }

  get streaming() {
    return this.running.has(this.conversation.id);
  }

  /** The id of the conversation that is open, null where it has not begun. */
  get id() {
    return this.conversation.messages.length ? this.conversation.id : null;
  }

  /** The key of its draft. There is one conversation that has not begun, however often it is opened. */
  get key() {
    return this.id ?? "new";
  }

  /** Show a conversation, or a new one. An answer that is under way goes on, seen or not. */
  open(id) {
    this.conversation = this.running.get(id)?.conversation ?? (id && this.store.conversation(id)) ?? newConversation();
    this.draw(0);
    this.follower.follow();
    this.onchange();
  }

  /** Show the messages from one on anew. */
  draw(from) {
    const gone = this.views.splice(from);
    if (gone.length) this.inspector.close();
    for (const view of gone) view.element.remove();
    for (const message of this.conversation.messages.slice(from)) this.add(message);
    this.update();
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
    this.drafts.forget(this.key);
    conversation.messages.push({ role: "user", content: text.trim() });
    this.answer(conversation);
    return true;
  }

  /** Ask something else in place of a question. Tells whether it was asked. */
  edit(index, text) {
    if (!text.trim() || this.streaming || this.blocked()) return false;
    const { conversation } = this;
    this.forgetEdits(index);
    addVersion(conversation.messages, index, { role: "user", content: text.trim() });
    this.draw(index);
    byId("prompt").focus();
    this.answer(conversation);
    return true;
  }

  /** Show another version of a question, and what followed it. */
  choose(index, which, step) {
    if (this.streaming) return;
    this.forgetEdits(index);
    showVersion(this.conversation.messages, index, which);
    this.draw(index);
    this.views[index].focusVersion(step);
    const [shown, count] = place(this.conversation.messages[index]);
    this.announce(`Version ${shown + 1} of ${count}`);
    this.keep(this.conversation);
    this.onchange();
  }

  forgetEdits(from) {
    for (let i = from; i < this.views.length; i++) this.drafts.forget(`${this.conversation.id}/${i}`);
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
      this.keep(conversation);
    }
  }

  regenerate() {
    if (this.streaming) return;
    this.conversation.messages.pop();
    this.draw(this.conversation.messages.length);
    this.answer(this.conversation);
  }

  /** Forget a conversation, and what is under way in it. */
  forget(id) {
    this.running.get(id)?.controller.abort();
    this.running.delete(id);
    this.store.forget(id);
    this.drafts.forget(id);
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
    this.draw(this.views.length);
    this.keep(conversation);
    this.follower.follow();
    this.onchange();
    this.announce("Answering");
    try {
      await this.stream(run, answer, messages);
    } catch (error) {
      fail(answer, error, controller.signal.aborted);
      if (error.status === 404) this.models.outdated = true; // the server has been started anew, with another model
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
      this.keep(run.conversation);
    }
  }

  keep(conversation) {
    conversation.title = conversation.messages[0].content.replace(/\s+/g, " ").slice(0, 80);
    return this.store.keep(conversation);
  }

  finish(run, answer) {
    const { conversation } = run;
    answer.ended = Date.now();
    if (this.running.get(conversation.id) !== run) return; // it was forgotten meanwhile
    this.running.delete(conversation.id);
    conversation.changed = Date.now();
    const kept = this.keep(conversation);
    if (conversation === this.conversation) {
      this.update();
      const { spoken } = this.views.at(-1);
      if (!answer.error) this.announce(answer.finish === "stopped" ? "Stopped" : `Answer: ${spoken}`);
    }
    if (!kept) this.announce("The browser has no room left to keep this conversation.");
    this.onchange();
  }

  add(message) {
    const view = message.role === "user" ? this.question(message) : this.answerView(message);
    this.views.push(view);
    this.list.append(view.element);
  }

  question(message) {
    const index = this.views.length;
    const key = `${this.conversation.id}/${index}`;
    return new QuestionView(message, {
      draft: {
        get: () => this.drafts.get(key),
        set: (text) => this.drafts.set(key, text),
        forget: () => this.drafts.forget(key),
      },
      onedit: (text) => this.edit(index, text),
      onversion: (which, step) => this.choose(index, which, step),
    });
  }

  answerView(message) {
    return new AnswerView(message, {
      inspector: this.inspector,
      onregenerate: () => {
        byId("prompt").focus();
        this.regenerate();
      },
    });
  }

  /** Show, before the next picture, what has come. */
  schedule() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (this.streaming) this.show(this.views.at(-1));
    });
  }

  show(view) {
    const last = view === this.views.at(-1);
    view.update({ busy: this.streaming, glass: this.glass, last });
    this.follower.grown();
  }

  update() {
    byId("opening").hidden = this.conversation.messages.length > 0;
    for (const view of this.views) this.show(view);
  }
}
