// Area charts of one series, in SVG. They are pictures of numbers that stand beside them as text.

import { svg } from "./element.js";

const HEIGHT = 100;

export class Chart {
  /** @param {string} className its size comes from the style sheet */
  constructor(className, label = null) {
    this.area = svg("path", { class: "chart-area" });
    this.line = svg("path", { class: "chart-line" });
    this.mark = svg("path", { class: "chart-mark" });
    const role = label === null ? { "aria-hidden": "true" } : { role: "img", "aria-label": label };
    const attributes = { class: `chart ${className}`, preserveAspectRatio: "none", ...role };
    this.element = svg("svg", attributes, this.area, this.line, this.mark);
  }

  /** Draw values of 0 to `most`, as steps, in a frame that has room for `room` of them; the last is at the right. */
  set(values, most, room = values.length) {
    const first = room - values.length;
    const heights = values.map((value) => (HEIGHT * (1 - Math.min(1, value / most))).toFixed(1));
    const steps = heights.map((y, i) => `V${y}H${first + i + 1}`).join("");
    this.element.setAttribute("viewBox", `0 0 ${Math.max(1, room)} ${HEIGHT}`);
    this.area.setAttribute("d", values.length ? `M${first} ${HEIGHT}${steps}V${HEIGHT}Z` : "");
    this.line.setAttribute("d", values.length ? `M${first} ${heights[0]}${steps}` : "");
  }

  /** Mark one of the values, or none. */
  select(index) {
    this.mark.setAttribute("d", index === null ? "" : `M${index + 0.5} 0V${HEIGHT}`);
  }

  /** Which of `count` values is at this place of the window. */
  at(clientX, count) {
    const { left, width } = this.element.getBoundingClientRect();
    return Math.max(0, Math.min(count - 1, Math.floor(((clientX - left) / width) * count)));
  }
}
