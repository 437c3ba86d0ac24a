// Which model answers.

import { byId, element } from "./element.js";

export class Models {
  constructor(api, store) {
    this.api = api;
    this.store = store;
    this.select = byId("model");
    this.names = [];
    this.select.addEventListener("change", () => store.set("model", this.current));
  }

  get current() {
    return this.names.length ? this.select.value : null;
  }

  /** The name of the model to ask, looked for where it is not known yet. Throws an ApiError where there is no server. */
  async ready() {
    if (!this.names.length) await this.load();
    return this.current;
  }

  async load() {
    try {
      this.names = await this.api.models();
    } catch (error) {
      this.select.replaceChildren(element("option", {}, error.status === 401 ? "no key, no model" : "no server"));
      throw error;
    }
    this.select.replaceChildren(...this.names.map((name) => element("option", {}, name)));
    this.select.disabled = this.names.length < 2;
    const chosen = this.store.setting("model", null);
    if (this.names.includes(chosen)) this.select.value = chosen;
  }
}
