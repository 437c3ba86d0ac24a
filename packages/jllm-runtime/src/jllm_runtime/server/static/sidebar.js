// Sidebar: the list of conversations.

import { byId, element, icon } from "./element.js";

export class Sidebar {
  /** @param {{onopen: (id) => void, ondelete: (conversation) => void}} handlers */
  constructor({ onopen, ondelete }) {
    this.list = byId("conversations");
    this.onopen = onopen;
    this.ondelete = ondelete;
  }

  /** @param {string} current its id @param {Map} running by id, those with an answer under way */
  show(conversations, current, running) {
    const focused = this.list.contains(document.activeElement) ? document.activeElement.dataset.id : null;
    this.list.replaceChildren(...conversations.map((one) => this.item(one, one.id === current, running.has(one.id))));
    byId("clear").disabled = !conversations.length;
    if (focused) this.list.querySelector(`.conversation-open[data-id="${focused}"]`)?.focus();
  }

  item(conversation, current, running) {
    const { id, title } = conversation;
    const open = element(
      "button",
      {
        type: "button",
        class: "conversation-open",
        "data-id": id,
        "data-running": running,
        "aria-current": current && "true",
        title,
        onclick: () => this.onopen(id),
      },
      title,
    );
    const remove = element(
      "button",
      {
        type: "button",
        class: "icon-button conversation-delete",
        "aria-label": `Delete “${title}”`,
        onclick: () => this.ondelete(conversation),
      },
      icon("close"),
    );
    return element("li", { class: "conversation" }, open, remove);
  }
}
