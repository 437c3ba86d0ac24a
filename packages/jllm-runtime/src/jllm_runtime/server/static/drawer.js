// Side drawer: beside the conversation where there is room, else over it.

import { byId, element } from "./element.js";

export class Drawer {
  /**
   * @param {string} id of the part; its button is `id-toggle`
   * @param {string} room a media query that tells whether there is room for it beside the conversation
   */
  constructor(id, room, store) {
    this.id = id;
    this.store = store;
    this.root = byId(id);
    this.toggle = byId(`${id}-toggle`);
    this.room = matchMedia(room);
    this.over = false; // whether it is open over the conversation
    this.scrim = element("div", { class: "scrim", onclick: () => this.close() });
    // Of those that lie over the conversation, one at a time.
    document.addEventListener("draweropen", ({ detail }) => {
      if (detail === this || !this.over) return;
      this.over = false;
      this.update();
    });
    this.toggle.addEventListener("click", () => (this.shown ? this.hide() : this.open()));
    this.room.addEventListener("change", () => {
      this.over = false;
      this.update();
    });
    this.update();
  }

  get shown() {
    return this.room.matches ? this.store.setting(`${this.id}.open`, true) : this.over;
  }

  open() {
    if (this.room.matches) this.store.set(`${this.id}.open`, true);
    else this.over = true;
    document.dispatchEvent(new CustomEvent("draweropen", { detail: this }));
    this.update();
    if (this.over) this.root.querySelector("button, input, textarea")?.focus({ preventScroll: true }); // its top first
  }

  hide() {
    if (this.room.matches) this.store.set(`${this.id}.open`, false);
    else this.close();
    this.update();
  }

  /** Close it where it lies over the conversation; tells whether it did. */
  close() {
    if (!this.over) return false;
    this.over = false;
    this.update();
    this.toggle.focus();
    return true;
  }

  update() {
    this.root.hidden = !this.shown;
    this.root.classList.toggle("overlay", this.over);
    this.toggle.setAttribute("aria-expanded", String(this.shown));
    document.querySelector("main").inert = this.over;
    if (this.over) this.root.before(this.scrim);
    else this.scrim.remove();
  }
}
