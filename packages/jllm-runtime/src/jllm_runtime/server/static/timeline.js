// Timeline of the engine's last seconds: a row for each sequence, its phases side by side, and the same as a table.

import { element, svg } from "./element.js";

const ROW = 10; // height of a row in the drawing's units
// Where a phase lies in its row, and its height: they can be told apart without their colours.
const PHASES = {
  waiting: [4, 2],
  prefill: [1, 8],
  decode: [3, 4],
  preempted: [7, 2],
};
const NOW = { waiting: "waiting", prefill: "prefill", decode: "decode", preempted: "preempted" };
const ENDED = { stop: "finished", length: "at its limit", cancelled: "cancelled", failed: "failed" };
const SHORTEST = 0.15; // seconds; what is shorter is drawn as wide as this

export class Timeline {
  constructor() {
    this.picture = svg("svg", { class: "timeline figure-picture", preserveAspectRatio: "none", role: "img" });
    this.note = element("p", { class: "figure-note" }, "\u00a0");
    this.body = element("tbody");
    const names = ["No.", "Now", "Waited", "Prefill", "Decode", "Tokens"];
    const head = names.map((name) => element("th", { scope: "col" }, name));
    this.element = element(
      "section",
      { class: "timeline-part", "aria-labelledby": "timeline-title" },
      element("h3", { class: "timeline-title", id: "timeline-title" }, "Sequences"),
      this.picture,
      element("ul", { class: "timeline-legend" }, Object.keys(PHASES).map(key)),
      this.note,
      element(
        "details",
        { class: "timeline-table" },
        element("summary", {}, "The same as a table, in seconds"),
        element("table", {}, element("thead", {}, element("tr", {}, head)), this.body),
      ),
    );
    this.show({ seconds: 30, rows: [], left_out: 0 });
  }

  /** @param {{seconds: number, rows: object[], left_out: number}} timeline what `GET /timeline` says */
  show({ seconds, rows, left_out: leftOut }) {
    this.picture.setAttribute("viewBox", `0 0 ${seconds} ${Math.max(1, rows.length) * ROW}`);
    this.picture.style.height = `${Math.max(1, rows.length) * 0.75}rem`;
    this.picture.replaceChildren(...rows.flatMap((row, number) => drawn(row, number, seconds)));
    this.body.replaceChildren(...rows.map(cells));
    const more = leftOut ? `, and ${leftOut} more` : "";
    this.note.textContent = rows.length ? `the last ${seconds} s, up to now at the right${more}` : "nothing has run";
    this.picture.setAttribute("aria-label", spoken(seconds, rows, leftOut));
  }
}

/** An entry of the legend. */
function key(phase) {
  const [top, height] = PHASES[phase];
  const sample = svg("rect", { class: phase, x: 0, y: top, width: 16, height });
  return element("li", {}, svg("svg", { viewBox: `0 0 16 ${ROW}`, "aria-hidden": "true" }, sample), phase);
}

function drawn({ spans }, number, seconds) {
  return spans.map(({ phase, start, end }) => {
    const [top, height] = PHASES[phase];
    const left = Math.max(0, seconds - start);
    const width = Math.max(SHORTEST, seconds - end - left);
    return svg("rect", { class: phase, x: left.toFixed(3), y: number * ROW + top, width: width.toFixed(3), height });
  });
}

/** How long a sequence was in these phases, also before the seconds that are drawn. */
function time(times, ...phases) {
  const sum = phases.reduce((all, phase) => all + (times[phase] ?? 0), 0);
  return sum.toFixed(sum < 10 ? 2 : 0);
}

function state({ ended, spans }) {
  return ended ? ENDED[ended] : NOW[spans.at(-1)?.phase];
}

function cells(row) {
  const { number, times, prompt_tokens: prompt, generated_tokens: generated } = row;
  const seconds = [time(times, "waiting", "preempted"), time(times, "prefill"), time(times, "decode")];
  const values = [state(row), ...seconds, `${prompt} + ${generated}`];
  return element(
    "tr",
    {},
    element("th", { scope: "row" }, String(number)),
    values.map((value) => element("td", {}, value)),
  );
}

/** The picture in a sentence. */
function spoken(seconds, rows, leftOut) {
  if (!rows.length) return `Timeline of the last ${seconds} seconds: nothing has run.`;
  const counts = new Map();
  for (const row of rows) counts.set(state(row), (counts.get(state(row)) ?? 0) + 1);
  const parts = [...counts].map(([name, count]) => `${count} ${name}`).join(", ");
  const all = rows.length + leftOut;
  return `Timeline of the last ${seconds} seconds: ${all} sequences, of which ${parts}. The table has each of them.`;
}
