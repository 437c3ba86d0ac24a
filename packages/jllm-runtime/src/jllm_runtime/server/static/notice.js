// Notice above the composer: the server is stopping, has stopped, or does not answer.

export class Notice {
  /** @param {HTMLElement} root @param {(text: string) => void} announce */
  constructor(root, announce) {
    this.root = root;
    this.announce = announce;
  }

  /** @param {import("./watch.js").State} now @param {import("./watch.js").State | null} before */
  show(now, before) {
    const text = notice(now);
    this.root.hidden = !text;
    this.root.textContent = ["stopped", "away"].includes(now.name) ? `${text} This page goes on when it is back.` : text;
    // The seconds run down on the page; they are read out once.
    if (now.name === before?.name) return;
    if (text) this.announce(text);
    else if (before && notice(before)) this.announce("The server is back.");
  }
}

function notice({ name, stats }) {
  if (name === "stopping") return `The server is stopping${waiting(stats.draining)}.`;
  if (name === "stopped") return "The server has stopped.";
  if (name === "away") return "The server does not answer.";
  return "";
}

function waiting({ answers, seconds_left: seconds }) {
  if (!answers) return "";
  const what = `${answers.toLocaleString("en")} ${answers === 1 ? "answer" : "answers"}`;
  return seconds > 0 ? `: waiting for ${what}, at most ${Math.ceil(seconds)} s` : `, and ends ${what}`;
}
