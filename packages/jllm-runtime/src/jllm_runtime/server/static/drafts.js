// Drafts: what was typed and not sent. Each stays with its conversation, in this tab (`sessionStorage`).

const DRAFT = "jllm.draft.";

export class Drafts {
  /** @param {Storage} storage */
  constructor(storage) {
    this.storage = storage;
  }

  /** A text, or null. Keys are a conversation's id, and `id/3` for a question of it that is being edited. */
  get(key) {
    return this.storage.getItem(DRAFT + key);
  }

  set(key, text) {
    try {
      this.storage.setItem(DRAFT + key, text);
    } catch {
      // the quota is used up; the text is on the page all the same
    }
  }

  /** Forget a draft, and those of the questions that belong to it. */
  forget(key) {
    const found = Object.keys(this.storage).filter((name) => `${name}/`.startsWith(`${DRAFT}${key}/`));
    for (const name of found) this.storage.removeItem(name);
  }
}
