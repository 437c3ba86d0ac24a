// Server watch: whether it answers, is stopping, or is gone. It looks once a second, while that matters to somebody.

const EVERY = 1000; // milliseconds
const NOBODY = [0, 502, 503, 504]; // no answer at all, or that of a proxy before a server that is gone
const TROUBLES = ["stopping", "stopped", "away"];

/**
 * What one look found.
 *
 * @typedef {object} State
 * @property {"live" | "stopping" | "stopped" | "away" | "key" | "blind"} name "stopped": after it was "stopping";
 *   "blind": it answers, and tells no figures
 * @property {string} text the same in a few words
 * @property {object} [stats] the figures
 */

export class Watch {
  /**
   * @param {import("./api.js").Api} api
   * @param {() => boolean} needed whether somebody sees the figures or waits for an answer
   * @param {(now: State, before: State | null) => void} onlook
   */
  constructor(api, needed, onlook) {
    this.api = api;
    this.needed = needed;
    this.onlook = onlook;
    this.state = null;
    this.looking = false;
    this.due = false; // a look that is wanted in any case
    document.addEventListener("visibilitychange", () => this.look());
  }

  /** Look now, and go on while it is needed, or until the server is well. */
  look() {
    this.due = true;
    this.wake();
  }

  /** Begin to look, where it is needed and not under way. */
  async wake() {
    if (this.looking) return;
    this.looking = true;
    while (this.wanted) {
      this.due = false;
      const before = this.state;
      this.state = await this.found();
      this.onlook(this.state, before);
      await new Promise((resolve) => setTimeout(resolve, EVERY));
    }
    this.looking = false;
  }

  get wanted() {
    if (document.visibilityState !== "visible") return false;
    return this.due || this.needed() || TROUBLES.includes(this.state?.name);
  }

  /** @returns {Promise<State>} */
  async found() {
    try {
      const stats = await this.api.stats();
      return stats.draining ? { name: "stopping", text: "stopping", stats } : { name: "live", text: "live", stats };
    } catch (error) {
      const { status } = error;
      if (status === 401) return { name: "key", text: this.api.key ? "the key is wrong" : "needs a key" };
      if (status && !NOBODY.includes(status)) return { name: "blind", text: `no figures (${status})` };
      const told = ["stopping", "stopped"].includes(this.state?.name);
      return told ? { name: "stopped", text: "stopped" } : { name: "away", text: "no answer from the server" };
    }
  }
}
