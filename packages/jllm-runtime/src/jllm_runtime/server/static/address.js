// Address of the open conversation: its id after the URL's "#/", for a reload, a bookmark, and the browser's Back.

const PREFIX = "#/";

export class Address {
  /** @param {(id: string | null) => void} onmove called when the reader went back, forward, or wrote another one */
  constructor(onmove) {
    addEventListener("popstate", () => onmove(this.id));
  }

  /** The conversation's id; null stands for a new one. */
  get id() {
    return location.hash.startsWith(PREFIX) ? location.hash.slice(PREFIX.length) : null;
  }

  /** Go to a conversation: Back leads to the one before. */
  go(id) {
    if (id !== this.id) history.pushState(null, "", named(id));
  }

  /** Name the conversation that is open, where it is not the one gone to: it has begun, or was deleted. */
  keep(id) {
    if (id !== this.id) history.replaceState(null, "", named(id));
  }
}

function named(id) {
  return id === null ? location.pathname + location.search : PREFIX + id;
}
