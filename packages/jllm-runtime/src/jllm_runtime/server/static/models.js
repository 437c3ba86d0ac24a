// Model selector.

import { byId, element } from "./element.js";

export class Models {
  /** @param {() => void} onchange called when another model is to be asked */
  constructor(api, store, onchange) {
    this.api = api;
    this.store = store;
    this.onchange = onchange;
    this.select = byId("model");
    this.models = [];
    this.outdated = false; // the server may have another model by now
    this.select.addEventListener("change", () => {
      store.set("model", this.current);
      onchange();
    });
  }

  /** The name of the model to ask, or null while none is known. */
  get current() {
    return this.models.length ? this.select.value : null;
  }

  /** What the server tells of that model, or null. */
  get card() {
    return this.models.find(({ id }) => id === this.current) ?? null;
  }

  /** The name, looked for where it is not known or outdated. Throws an ApiError where there is no server. */
  async ready() {
    if (!this.models.length || this.outdated) await this.load();
    return this.current;
  }

  async load() {
    try {
      this.models = await this.api.models();
    } catch (error) {
      this.models = [];
      this.select.disabled = true;
      this.select.replaceChildren(element("option", {}, this.missing(error)));
      throw error;
    }
    this.outdated = false;
    const names = this.models.map(({ id }) => id);
    this.select.replaceChildren(...names.map((name) => element("option", {}, name)));
    this.select.disabled = names.length < 2;
    const chosen = this.store.setting("model", null);
    if (names.includes(chosen)) this.select.value = chosen;
    this.onchange();
  }
  missing({ status }) {
    if (status !== 401) return "no server";
    return this.api.key ? "wrong key, no model" : "no key, no model";
  }
}
