// Entry point of the page.

import { Api } from "./api.js";
import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { ask } from "./dialog.js";
import { Drawer } from "./drawer.js";
import { byId } from "./element.js";
import { Engine } from "./engine.js";
import { legend } from "./glass.js";
import { Inspector } from "./inspector.js";
import { Models } from "./models.js";
import { Parameters } from "./parameters.js";
import { Follower } from "./scroll.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";

const CURRENT = "jllm.current"; // in sessionStorage: each tab has its conversation

const store = new Store(localStorage);
const api = new Api(askForKey);
const parameters = new Parameters(store);
const models = new Models(api, store, () => parameters.setThinking(models.switchable));
const inspector = new Inspector(byId("inspector"), announce);
const follower = new Follower(byId("scroller"), byId("messages"), byId("latest"), () => inspector.anchor !== null);
const drawers = {
  sidebar: new Drawer("sidebar", "(min-width: 60rem)", store),
  panel: new Drawer("panel", "(min-width: 80rem)", store),
};
const sidebar = new Sidebar({ onopen: openConversation, ondelete: deleteConversation });
const chat = new Chat({ api, store, models, parameters, inspector, follower, announce }, changed);
const composer = new Composer(chat, problem);
new Engine(api, announce, () => models.ready().catch(() => {}));

/** Tell those who listen to the page. */
function announce(text) {
  byId("announcer").textContent = text;
}

function changed() {
  sessionStorage.setItem(CURRENT, chat.conversation.id);
  sidebar.show(store.conversations(), chat.conversation.id, chat.running);
  composer.update();
}

function openConversation(id) {
  chat.open(id);
  drawers.sidebar.close();
  byId("prompt").focus();
}

async function deleteConversation({ id, title }) {
  byId("confirm-title").textContent = `Delete “${title}”?`;
  if (await ask(byId("confirm-dialog"))) {
    chat.forget(id);
    byId("new-conversation").focus();
  }
}

async function clear() {
  byId("confirm-title").textContent = "Delete all conversations?";
  if (!(await ask(byId("confirm-dialog")))) return;
  for (const { id } of store.conversations()) chat.forget(id);
  byId("new-conversation").focus();
}

async function askForKey() {
  const field = byId("key-field");
  field.value = api.key;
  if (!(await ask(byId("key-dialog")))) return false;
  api.key = field.value.trim();
  return true;
}

function problem() {
  const found = parameters.problem();
  if (found) drawers.panel.open();
  return found;
}

function setGlass(on) {
  store.set("glass", on);
  byId("glass-toggle").setAttribute("aria-pressed", String(on));
  byId("legend").hidden = !on;
  chat.setGlass(on);
}

byId("legend").append(...legend());
byId("new-conversation").addEventListener("click", () => openConversation(null));
byId("clear").addEventListener("click", clear);
byId("key").addEventListener("click", async () => {
  if (await askForKey()) models.load().catch(() => {});
});
byId("glass-toggle").addEventListener("click", () => setGlass(!chat.glass));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) return;
  inspector.close() || drawers.sidebar.close() || drawers.panel.close() || chat.stop();
});
addEventListener("storage", changed); // another tab

setGlass(store.setting("glass", false));
chat.open(sessionStorage.getItem(CURRENT));
models.ready().catch(() => {});
byId("prompt").focus();
