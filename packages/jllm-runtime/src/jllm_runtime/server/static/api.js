// API client: requests, responses, errors.

import { events } from "./events.js";

const KEY = "jllm.key";

/** What the server, or the way to it, has to say against a request. `status` is 0 where no answer came. */
export class ApiError extends Error {
  constructor(message, status, type = "") {
    super(message);
    this.status = status;
    this.type = type;
  }
}

export class Api {
  /**
   * @param {(refused: boolean) => Promise<boolean>} askForKey called when the server wants a key, or refused the one it
   *   got; tells whether there is a new one
   */
  constructor(askForKey) {
    this.askForKey = askForKey;
    this.asking = null;
  }

  get key() {
    return sessionStorage.getItem(KEY) ?? "";
  }

  set key(value) {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  }

  /** The models, at least one: objects with an id, and maybe with abilities. */
  async models() {
    return (await (await this.request("v1/models")).json()).data;
  }

  /** What the engine is doing. Does not ask for a key: it is called every second. */
  async stats() {
    const options = { signal: AbortSignal.timeout(5000), patient: false };
    return (await this.request("stats", options)).json();
  }

  /** The phases of the last sequences. Does not ask for a key either. */
  async timeline() {
    const options = { signal: AbortSignal.timeout(5000), patient: false };
    return (await this.request("timeline", options)).json();
  }

  /** The chunks of a streamed chat completion. Throws an ApiError, also when the stream ends before it is complete. */
  async *complete(body, signal) {
    const options = { method: "POST", signal, body: JSON.stringify({ ...body, stream: true }) };
    const response = await this.request("v1/chat/completions", options);
    try {
      for await (const data of events(response.body)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(chunk.error.message, response.status, chunk.error.type);
        yield chunk;
      }
    } catch (error) {
      if (error instanceof TypeError) throw new ApiError("The connection to the server broke off.", 0);
      throw error;
    }
    throw new ApiError("The server ended the connection before the answer was complete.", 0);
  }

  /** A response whose status is good. Where the server wants a key, asks for one and tries again. */
  async request(path, { patient = true, ...options } = {}) {
    for (;;) {
      const key = this.key;
      const response = await this.fetch(path, key, options);
      if (response?.ok) return response;
      const error = response ? await failure(response) : new ApiError("No key has such characters.", 401);
      if (error.status !== 401 || !patient) throw error;
      if (this.key === key && !(await this.ask(key !== ""))) throw error;
    }
  }

  /** A response, or null where the key cannot even be sent. */
  async fetch(path, key, options) {
    const headers = { "Content-Type": "application/json" };
    if (/[^\x20-\xff]/.test(key)) return null; // fetch would call it a failure of the network
    if (key) headers.Authorization = `Bearer ${key}`;
    try {
      // Relative to the page, so that it works under a path of a proxy, too.
      return await fetch(new URL(path, document.baseURI), { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new ApiError("The server does not answer. Is it running?", 0);
    }
  }

  /** Ask once, however many requests wait for the key. */
  ask(refused) {
    this.asking ??= this.askForKey(refused).finally(() => (this.asking = null));
    return this.asking;
  }
}

async function failure(response) {
  const body = await response.json().catch(() => ({}));
  const message = body.error?.message ?? `The server answered with status ${response.status}.`;
  return new ApiError(message, response.status, body.error?.type);
}
