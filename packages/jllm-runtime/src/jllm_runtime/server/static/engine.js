// Engine statistics, once a second while the panel can be seen.

import { Chart } from "./chart.js";
import { byId, element } from "./element.js";

const EVERY = 1000; // milliseconds
const KEPT = 60; // values in a chart
const MOST_SLOTS = 64; // drawn one by one; of more, their share

export class Engine {
  /** @param {() => void} onback called when the server answers, at first or again */
  constructor(api, announce, onback) {
    this.api = api;
    this.announce = announce;
    this.onback = onback;
    this.state = null; // "live", "away", "key"
    this.history = { running: [], rate: [] };
    this.build();
    document.addEventListener("visibilitychange", () => this.wake());
    new IntersectionObserver(() => this.wake()).observe(this.root);
    this.wake();
  }

  get visible() {
    return document.visibilityState === "visible" && this.root.checkVisibility();
  }

  build() {
    this.root = byId("engine");
    this.status = element("span", { class: "engine-status" }, "…");
    const title = element("h2", { class: "caption", id: "engine-title" }, "Engine");
    this.batch = new Figure("Batch", true, true);
    this.pages = new Figure("Pages", true, false);
    this.prefix = new Figure("Prefix hits", true, false);
    this.rate = new Figure("Tokens a second", false, true);
    this.totals = element("p", { class: "figure-note" }, "\u00a0");
    const figures = [this.batch, this.pages, this.prefix, this.rate].map((figure) => figure.element);
    this.root.append(
      element("div", { class: "panel-head" }, title, this.status),
      element("dl", { class: "figures" }, figures),
      this.totals,
    );
  }

  /** Begin to look, unless that is under way. */
  async wake() {
    if (this.looking) return;
    this.looking = true;
    while (this.visible) {
      await this.look();
      await new Promise((resolve) => setTimeout(resolve, EVERY));
    }
    this.looking = false;
  }

  async look() {
    try {
      this.show(await this.api.stats());
      this.enter("live", "live");
    } catch (error) {
      if (error.status === 401) this.enter("key", "needs a key");
      else if (error.status) this.enter("away", `no figures (${error.status})`);
      else this.enter("away", "no answer from the server");
    }
  }

  enter(state, text) {
    this.status.textContent = text;
    if (state === this.state) return;
    this.root.dataset.state = state;
    if (state === "live") this.onback();
    if (state === "away") this.announce("The server does not answer.");
    else if (this.state === "away") this.announce("The server is back.");
    this.state = state;
  }

  show(stats) {
    const push = (series, value) => (this.history[series] = [...this.history[series], value].slice(-KEPT));
    push("running", stats.running);
    push("rate", stats.tokens_per_second);
    const waiting = stats.waiting ? `${number(stats.waiting)} waiting` : "none waiting";
    this.batch.set(`${number(stats.running)} of ${number(stats.max_batch)}`, waiting);
    this.batch.parts(slots(stats.running, stats.max_batch));
    this.batch.chart.set(this.history.running, Math.max(1, stats.max_batch), KEPT);
    const { pages, pages_in_use: used, pages_idle: idle } = stats;
    this.pages.set(
      `${number(used)} of ${number(pages)} in use`,
      `${number(idle)} idle, kept for prompts that begin alike`,
    );
    this.pages.parts([
      ["used", used],
      ["idle", idle],
      ["free", Math.max(0, pages - used - idle)],
    ]);
    const { prompt_tokens: prompt, reused_tokens: reused } = stats;
    const share = prompt ? `${Math.round((100 * reused) / prompt)} %` : "–";
    this.prefix.set(share, prompt ? `${number(reused)} of ${number(prompt)} prompt tokens reused` : "no prompts yet");
    this.prefix.parts([
      ["used", reused],
      ["free", Math.max(0, prompt - reused) || 1],
    ]);
    const rate = stats.tokens_per_second;
    this.rate.set(rate.toFixed(rate < 100 ? 1 : 0), `${number(stats.generated_tokens)} since the start`);
    this.rate.chart.set(this.history.rate, Math.max(1, ...this.history.rate), KEPT);
    const ended = ["finished", "cancelled", "failed"].map((name) => `${number(stats[name])} ${name}`);
    const yielded = stats.preemptions ? `, ${number(stats.preemptions)} preempted` : "";
    this.totals.textContent = `Answers: ${ended.join(", ")}${yielded}`;
  }
}

/** A number with its name, a bar, a note, and maybe a chart of how it was. */
class Figure {
  constructor(name, withBar, withChart) {
    this.value = element("dd", { class: "figure-value" }, "–");
    this.bar = element("div", { class: "figure-bar" });
    this.note = element("dd", { class: "figure-note" }, "\u00a0");
    this.chart = withChart && new Chart("figure-chart");
    const picture = element(
      "dd",
      { class: "figure-picture", "aria-hidden": "true" },
      withBar && this.bar,
      withChart && this.chart.element,
    );
    this.element = element("div", { class: "figure" }, element("dt", {}, name), this.value, picture, this.note);
  }

  set(value, note) {
    this.value.textContent = value;
    this.note.textContent = note;
  }

  /** @param {[string, number][]} parts kinds and how much of the bar each takes */
  parts(parts) {
    const seen = parts.filter(([, size]) => size > 0);
    const cells = seen.map(([kind, size]) => {
      const cell = element("span", { class: kind });
      cell.style.flexGrow = size;
      return cell;
    });
    this.bar.replaceChildren(...cells);
  }
}

function slots(running, most) {
  if (most > MOST_SLOTS)
    return [
      ["used", running],
      ["free", most - running],
    ];
  return Array.from({ length: most }, (_, i) => [i < running ? "used" : "free", 1]);
}

function number(value) {
  return value.toLocaleString("en");
}
