// Engine statistics in the panel.

import { Chart } from "./chart.js";
import { byId, element } from "./element.js";
import { Timeline } from "./timeline.js";

const KEPT = 60; // values in a chart
const MOST_SLOTS = 64; // drawn one by one; of more, their share

export class Engine {
  /** @param {() => void} onvisible called when it comes into view, and goes */
  constructor(onvisible) {
    this.history = { running: [], rate: [] };
    this.seen = null; // when the figures were new
    this.busy = false;
    this.idle = null; // since when nothing runs, as far as the page has seen it
    this.build();
    new IntersectionObserver(() => {
      if (!this.visible) this.dim();
      onvisible();
    }).observe(this.root);
    document.addEventListener("visibilitychange", () => document.hidden && this.dim());
  }

  get visible() {
    return this.root.checkVisibility();
  }

  build() {
    this.root = byId("engine");
    this.status = element("span", { class: "engine-status" }, "…");
    this.age = element("p", { class: "figure-note engine-age" }, "\u00a0");
    const title = element("h2", { class: "caption", id: "engine-title" }, "Engine");
    this.batch = new Figure("Batch", true, true);
    this.pages = new Figure("Pages", true, false);
    this.prefix = new Figure("Prefix hits", true, false);
    this.rate = new Figure("Tokens a second", false, true);
    this.timeline = new Timeline();
    this.totals = element("p", { class: "figure-note" }, "\u00a0");
    const figures = [this.batch, this.pages, this.prefix, this.rate].map((figure) => figure.element);
    this.root.append(
      element("div", { class: "panel-head" }, title, this.status),
      this.age,
      element("dl", { class: "figures" }, figures),
      this.totals,
      this.timeline.element,
    );
  }

  /** @param {import("./watch.js").State} state */
  show({ name, text, stats }) {
    this.root.dataset.state = name;
    this.status.textContent = text;
    if (!stats) return this.dim();
    this.seen = new Date();
    this.root.classList.remove("stale");
    this.age.textContent = "now, and once a second";
    this.figures(stats);
  }

  /** The figures are of the past from here on. */
  dim() {
    if (!this.seen) return;
    this.busy = false; // when its answers end, is not seen
    this.root.classList.add("stale");
    this.age.textContent = `as they were at ${clock(this.seen)}`;
  }

  figures(stats) {
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
    const busy = stats.running + stats.waiting > 0;
    if (busy) this.idle = null;
    else if (this.busy) this.idle = new Date();
    this.busy = busy;
    const since = this.idle ? `, idle since ${clock(this.idle)}` : "";
    this.rate.set(rate.toFixed(rate < 100 ? 1 : 0), `${number(stats.generated_tokens)} since the start${since}`);
    this.rate.element.classList.toggle("stale", !busy);
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

function clock(time) {
  return time.toLocaleTimeString("en-GB");
}

function number(value) {
  return value.toLocaleString("en");
}
