// Entry point of the page.

import { Address } from "./address.js";
import { Api } from "./api.js";
import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { ask } from "./dialog.js";
import { Drafts } from "./drafts.js";
import { Drawer } from "./drawer.js";
import { byId } from "./element.js";
import { Engine } from "./engine.js";
import { legend } from "./glass.js";
import { Inspector } from "./inspector.js";
import { Models } from "./models.js";
import { Notice } from "./notice.js";
import { Parameters } from "./parameters.js";
import { Follower } from "./scroll.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";
import { Watch } from "./watch.js";

const CURRENT = "jllm.current"; // in sessionStorage: the tab's conversation, for those who write the bare address again

const address = new Address(openConversation);
const drafts = new Drafts(sessionStorage);
const store = new Store(localStorage);
const api = new Api(askForKey);
const parameters = new Parameters(store);
const models = new Models(api, store, () => parameters.fit(models.card));
const inspector = new Inspector(byId("inspector"), announce);
const follower = new Follower(byId("scroller"), byId("messages"), byId("latest"), () => inspector.anchor !== null);
const drawers = {
  sidebar: new Drawer("sidebar", "(min-width: 60rem)", store),
  panel: new Drawer("panel", "(min-width: 64rem)", store),
};
const sidebar = new Sidebar({ onopen: goTo, ondelete: deleteConversation });
const blocked = () => composer.blocked();
const chat = new Chat({ api, store, drafts, models, parameters, inspector, follower, announce, blocked }, changed);
const composer = new Composer(chat, drafts, problem);
const notice = new Notice(byId("notice"), announce);
const engine = new Engine(() => watch.wake());
const watch = new Watch(api, () => engine.visible || chat.running.size > 0, looked);
let timelineAsked = false;

/** Tell those who listen to the page. */
function announce(text) {
  byId("announcer").textContent = text;
}

function changed() {
  if (chat.id) sessionStorage.setItem(CURRENT, chat.id);
  else sessionStorage.removeItem(CURRENT);
  address.keep(chat.id);
  document.title = chat.id ? `${chat.conversation.title} · JLLM` : "JLLM";
  list();
  composer.update();
  watch.look(); // an answer begins, or it has failed
}

function list() {
  sidebar.show(store.conversations(), chat.conversation.id, chat.running);
}

/** What a look at the server found. */
function looked(now, before) {
  engine.show(now);
  if (now.stats && engine.visible) showTimeline();
  notice.show(now, before);
  if (now.name !== "live" || before?.name === "live") return;
  // It may have come back with another model.
  if (before) models.load().catch(() => {});
  else models.ready().catch(() => {});
}

/** Show the timeline, beside the figures: where it fails, they say so. A slow server is asked again when it has told. */
async function showTimeline() {
  if (timelineAsked) return;
  timelineAsked = true;
  try {
    engine.timeline.show(await api.timeline());
  } catch {
    // The last one stays.
  } finally {
    timelineAsked = false;
  }
}

function goTo(id) {
  address.go(id);
  openConversation(id);
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

async function askForKey(refused = false) {
  const field = byId("key-field");
  field.value = api.key;
  field.setAttribute("aria-invalid", String(refused));
  byId("key-wrong").hidden = !refused;
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
byId("new-conversation").addEventListener("click", () => goTo(null));
byId("clear").addEventListener("click", clear);
byId("key").addEventListener("click", async () => {
  if (await askForKey()) models.load().catch(() => {});
});
byId("glass-toggle").addEventListener("click", () => setGlass(!chat.glass));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) return;
  inspector.close() || drawers.sidebar.close() || drawers.panel.close() || chat.stop();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address names the conversation
  byId("prompt").focus();
});
addEventListener("storage", list); // another tab

setGlass(store.setting("glass", false));
openConversation(address.id ?? sessionStorage.getItem(CURRENT));
models.ready().catch(() => {});
