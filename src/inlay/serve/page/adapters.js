// The adapters that are served, and loading and unloading where the key allows it.

import { ask } from "./api.js";
import { $, bytes, el, say } from "./dom.js";

const MANY = 12;
const lines = new Map();
let changed = async () => {};

/** `onChange` is called when an adapter was loaded or unloaded. */
export function startAdapters(onChange) {
  changed = onChange;
  $("find").addEventListener("input", find);
  $("load").addEventListener("submit", (event) => {
    event.preventDefault();
    const name = $("load-name").value.trim();
    load(name, $("load-path").value.trim() || name);
  });
}

/** Show the adapters; a line that stays keeps its place and its focus. */
export function show(adapters, mayLoad) {
  const names = new Set(adapters.map((one) => one.name));
  for (const [name, line] of lines) {
    if (names.has(name)) continue;
    line.row.remove();
    lines.delete(name);
  }
  adapters.forEach((one, n) => {
    if (!lines.has(one.name)) lines.set(one.name, newLine(one.name));
    const line = lines.get(one.name);
    update(line, one, mayLoad);
    if ($("adapters").children[n] !== line.row) $("adapters").insertBefore(line.row, $("adapters").children[n] ?? null);
  });
  $("no-adapters").hidden = adapters.length > 0;
  $("find-box").hidden = adapters.length <= MANY;
  $("load").hidden = !mayLoad;
  find();
}

function newLine(name) {
  const note = el("span", { class: "note" });
  const parts = { method: el("td"), size: el("td", { class: "n" }), state: el("span") };
  const unload = el("button", { type: "button", text: "Unload", "aria-label": "Unload " + name });
  unload.addEventListener("click", () => drop(name));
  const row = el("tr", {}, el("th", { scope: "row" }, el("span", { text: name }), note), parts.method, parts.size, el("td", {}, parts.state, " ", unload));
  return { row, note, unload, ...parts };
}

function update(line, one, mayLoad) {
  const labels = one.labels.length ? "labels: " + one.labels.slice(0, 6).join(", ") + (one.labels.length > 6 ? ", …" : "") : "";
  const set = (place, words) => place.textContent !== words && (place.textContent = words);
  set(line.note, one.error ?? labels);
  line.note.classList.toggle("bad", Boolean(one.error));
  set(line.method, (one.method || "?") + (one.rank ? ", " + one.rank : ""));
  set(line.size, bytes(one.bytes));
  set(line.state, one.loaded ? "loaded" : one.error ? "broken" : "on disk");
  line.unload.hidden = !mayLoad;
}

function find() {
  const wanted = $("find-box").hidden ? "" : $("find").value.trim().toLowerCase();
  for (const [name, line] of lines) line.row.hidden = !name.toLowerCase().includes(wanted);
}

async function load(name, path) {
  say($("load-state"), "Loading " + name + " …");
  try {
    await ask("v1/load_lora_adapter", { lora_name: name, lora_path: path });
    $("load").reset();
    await changed();
    say($("load-state"), name + " is loaded.");
  } catch (error) {
    say($("load-state"), error.message, true);
  }
}

async function drop(name) {
  if (!confirm("Serve " + name + " no more? Answers under way go on to their end.")) return;
  try {
    await ask("v1/unload_lora_adapter", { lora_name: name });
    await changed();
    say($("load-state"), name + " is unloaded.");
    $("refresh").focus();
  } catch (error) {
    say($("load-state"), error.message, true);
  }
}
