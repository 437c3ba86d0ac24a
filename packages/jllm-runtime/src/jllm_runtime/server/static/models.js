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
    this.select.addEventListener("change", () => {
      store.set("model", this.current);
      onchange();
    });
  }

  /** The name of the model to ask, or null while none is known. */
  get current() {
    return this.models.length ? this.select.value : null;
  }

  /** Whether thinking can be turned on and off, as far as the server tells. */
  get switchable() {
    const model = this.models.find(({ id }) => id === this.current);
    return model?.abilities?.chat_template_kwargs?.includes("enable_thinking") ?? true;
  }

  /** The same, looked for where it is not known yet. Throws an ApiError where there is no server. */
  async ready() {
    if (!this.models.length) await this.load();
    return this.current;
  }

  async load() {
    try {
      this.models = await this.api.models();
    } catch (error) {
      this.select.replaceChildren(element("option", {}, error.status === 401 ? "no key, no model" : "no server"));
      throw error;
    }
    const names = this.models.map(({ id }) => id);
    this.select.replaceChildren(...names.map((name) => element("option", {}, name)));
    this.select.disabled = names.length < 2;
    const chosen = this.store.setting("model", null);
    if (names.includes(chosen)) this.select.value = chosen;
    this.onchange();
  }
}
