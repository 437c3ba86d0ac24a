// Storage of conversations and settings in localStorage. Two tabs share it without a common index.

import { everyMessage } from "./versions.js";

const CONVERSATION = "jllm.conversation.";
const SETTING = "jllm.setting.";

/** A conversation that has not begun. It is kept from its first message on. */
export function newConversation() {
  return { id: newId(), title: "", changed: Date.now(), messages: [] };
}

function newId() {
  // crypto.randomUUID exists on secure origins only, and a plain http address is none.
  return Array.from(crypto.getRandomValues(new Uint32Array(3)), (n) => n.toString(36)).join("");
}

export class Store {
  /** @param {Storage} storage */
  constructor(storage) {
    this.storage = storage;
  }

  /** All conversations, the one that changed last first. */
  conversations() {
    const keys = Object.keys(this.storage).filter((key) => key.startsWith(CONVERSATION));
    const read = keys.map((key) => this.parse(key)).filter((found) => Array.isArray(found?.messages));
    return read.sort((a, b) => b.changed - a.changed);
  }

  conversation(id) {
    return this.parse(CONVERSATION + id);
  }

  /** Keep a conversation. Where there is no room, probabilities go first, the oldest conversation's before others'. */
  keep(conversation) {
    const write = () => this.write(CONVERSATION + conversation.id, conversation);
    if (write()) return true;
    for (const old of this.conversations().reverse()) {
      if (old.id === conversation.id || !dropTokens(old)) continue;
      this.write(CONVERSATION + old.id, old);
      if (write()) return true;
    }
    return dropTokens(conversation) && write();
  }

  forget(id) {
    this.storage.removeItem(CONVERSATION + id);
  }

  setting(name, otherwise) {
    return this.parse(SETTING + name) ?? otherwise;
  }

  set(name, value) {
    this.write(SETTING + name, value);
  }

  parse(key) {
    try {
      return JSON.parse(this.storage.getItem(key));
    } catch {
      return null; // not ours, or damaged
    }
  }

  write(key, value) {
    try {
      this.storage.setItem(key, JSON.stringify(value));
      return true;
    } catch {
      return false; // the quota is used up, or the browser keeps nothing
    }
  }
}

function dropTokens(conversation) {
  const messages = [...everyMessage(conversation.messages)];
  const found = messages.filter((message) => message.tokens?.length || message.thoughtTokens?.length);
  for (const message of found) {
    message.tokens = [];
    message.thoughtTokens = [];
  }
  return found.length > 0;
}
