// The page of a server: what is served is asked once, and again every now and then where no key's rate is spent by it.

import { show, startAdapters } from "./adapters.js";
import { ask, key } from "./api.js";
import { offer, startChat } from "./chat.js";
import { offerLabels, startClassify } from "./classify.js";
import { $, say } from "./dom.js";
import { showExperiments } from "./experiments.js";

const AGAIN = 30000; // milliseconds

/** Ask what is served, and show it. */
async function refresh() {
  try {
    const found = await ask("v1/adapters");
    const models = (await ask("v1/models")).data.map((model) => model.id);
    const adapters = found.data;
    const count = adapters.length === 1 ? "1 adapter" : adapters.length + " adapters";
    const heads = new Set(adapters.filter((one) => one.task && one.task !== "generate").map((one) => one.name));
    const alone = adapters.filter((one) => one.kind && one.kind !== "messages").map((one) => one.name);
    await showExperiments(found.may_load);
    offer(models.filter((name) => found.writes && !heads.has(name)), new Set(alone));
    offerLabels(adapters.filter((one) => one.kind === "label" || heads.has(one.name)).map((one) => one.name));
    show(adapters, found.may_load);
    $("trouble").hidden = true;
    $("tenant").hidden = false;
    $("forget").hidden = !key.get();
    say($("about"), "Base " + found.base + ", " + count + ".");
  } catch (error) {
    refused(error);
  }
}

function refused(error) {
  if (error.status === 401) {
    const known = key.get() !== null;
    key.forget();
    $("tenant").hidden = true;
    $("forget").hidden = true;
    say($("about"), "This server answers those who have a key.");
    $("key-form").hidden = false;
    $("key").focus();
    $("trouble").hidden = true;
    if (!known) return; // nobody has given a key yet: that is no error
  }
  $("trouble").hidden = false;
  say($("trouble"), error.message ?? String(error), true);
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  try {
    key.set($("key").value.trim());
    $("key").value = "";
    refresh();
  } catch (error) {
    refused(error);
  }
});
$("forget").addEventListener("click", () => {
  key.forget();
  location.reload();
});
$("refresh").addEventListener("click", refresh);
startChat();
startClassify();
startAdapters(refresh);
if (key.get()) $("key-form").hidden = false;
refresh();
setInterval(() => {
  if (!key.get() && !$("tenant").hidden && document.hasFocus()) refresh();
}, AGAIN);
