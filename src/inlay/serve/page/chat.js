// One prompt to several models at once. The requests leave together, so that the engine reads them in one forward.

import { ask, events } from "./api.js";
import { $, el, fill, say, seconds } from "./dom.js";

const SLOTS = ["model-1", "model-2", "model-3"];
const ENDS = { length: "cut at its number of tokens" };
const histories = new Map(); // by place and model: what was said in this chat
let single = new Set(); // models that were trained on single prompts
let running = null;
let visitor = ""; // whoever chats stays with one arm of an experiment

/** Offer the models; those that answer single prompts alone are in `alone`. */
export function offer(models, alone) {
  single = alone;
  $("chat").hidden = models.length === 0;
  $("no-text").hidden = models.length > 0;
  SLOTS.forEach((id, n) => fill($(id), models, n ? "none" : null, models[n < 2 ? n : -1] ?? ""));
}

export function startChat() {
  visitor = drawn();
  $("chat").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("chat").requestSubmit();
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("anew").addEventListener("click", anew);
}

function anew() {
  running?.abort();
  histories.clear();
  visitor = drawn();
  $("turns").replaceChildren();
  $("anew").hidden = true;
  say($("chat-state"), "");
  $("prompt").focus();
}

function drawn() {
  return "page-" + [...crypto.getRandomValues(new Uint32Array(4))].map((part) => part.toString(16)).join("");
}

async function send() {
  const prompt = $("prompt").value;
  const chosen = SLOTS.map((id, n) => ({ model: $(id).value, slot: n })).filter((one) => one.model);
  if (running) return say($("chat-state"), "Answers are still being written: stop them first.", true);
  if (!prompt.trim() || !chosen.length) {
    $("prompt").focus();
    return say($("chat-state"), chosen.length ? "Write a prompt first." : "Choose a model first.", true);
  }
  const own = (running = new AbortController());
  const answers = el("div", { class: "answers" });
  const turn = el("article", { class: "turn", "aria-label": "Turn" }, el("p", { class: "asked", text: prompt }), answers);
  $("turns").append(turn);
  $("prompt").value = "";
  $("prompt").focus();
  $("stop").hidden = $("anew").hidden = false;
  say($("chat-state"), chosen.length > 1 ? chosen.length + " models write …" : "It writes …");
  const settings = { max_tokens: Number($("tokens").value), temperature: Number($("temperature").value) };
  const works = chosen.map(({ model, slot }) => {
    const shown = answerBox(model);
    answers.append(shown.box);
    return write(model, slot, prompt, settings, shown, own.signal);
  });
  turn.scrollIntoView({ block: "nearest" });
  const failed = (await Promise.all(works)).filter((fine) => !fine).length;
  if (running === own) running = null;
  if (document.activeElement === $("stop")) $("prompt").focus();
  $("stop").hidden = running === null;
  if (!turn.isConnected) return; // a new chat has begun
  if (own.signal.aborted) say($("chat-state"), "Stopped.");
  else say($("chat-state"), failed ? failed + " of " + works.length + " failed." : "Done.", failed > 0);
}

function answerBox(model) {
  const written = el("p", { class: "written", "aria-live": "polite", "aria-busy": "true" });
  const text = document.createTextNode("");
  written.append(text);
  const note = el("p", { class: "note" });
  const title = el("h3", { text: model });
  return { box: el("section", { class: "answer", "aria-label": model }, title, written, note), written, text, note };
}

/** Stream one answer into its box; returns whether it came. */
async function write(model, slot, prompt, settings, shown, signal) {
  const place = slot + " " + model;
  const earlier = single.has(model) ? [] : (histories.get(place) ?? []);
  const messages = [...earlier, { role: "user", content: prompt }];
  const body = { model, messages, ...settings, user: visitor, stream: true, stream_options: { include_usage: true } };
  const began = performance.now();
  const found = { first: null, usage: null, reason: null, id: null, arm: null };
  let fine = false;
  try {
    for await (const event of events("v1/chat/completions", body, signal)) {
      const choice = event.choices?.[0];
      if (choice?.delta?.content) {
        found.first ??= performance.now() - began;
        shown.text.appendData(choice.delta.content);
      }
      found.reason = choice?.finish_reason ?? found.reason;
      found.usage = event.usage ?? found.usage;
      found.id = event.id;
      found.arm = event.system_fingerprint ?? found.arm;
    }
    if (!signal.aborted) histories.set(place, [...messages, { role: "assistant", content: shown.text.data }]);
    say(shown.note, facts(found, performance.now() - began, earlier.length));
    if (found.arm !== null) shown.box.append(judging(model, found));
    fine = true;
  } catch (error) {
    const stopped = error.name === "AbortError";
    const hint = earlier.length && error.status === 400 ? " A new chat sends the prompt alone." : "";
    say(shown.note, stopped ? "Stopped." : error.message + hint, !stopped);
    fine = stopped;
  }
  shown.written.setAttribute("aria-busy", "false");
  shown.written.hidden = shown.text.data === "";
  return fine;
}

/** Buttons to judge the answer of an experiment; which arm gave it is said afterwards, so that it sways nobody. */
function judging(model, { id, arm }) {
  const state = el("span", { class: "note", role: "status" });
  const buttons = [["up", "Good"], ["down", "Bad"]].map(([thumbs, text]) => {
    const button = el("button", { type: "button", text, "aria-label": text + ", " + model });
    button.addEventListener("click", async () => {
      try {
        await ask("v1/feedback", { id, thumbs });
        say(state, text + ", noted. The arm " + arm + " wrote this.");
      } catch (error) {
        say(state, error.message, true);
      }
    });
    return button;
  });
  return el("div", { class: "tools judging" }, ...buttons, state);
}

function facts({ first, usage, reason }, took, earlier) {
  const said = [];
  if (usage) {
    const made = usage.completion_tokens;
    said.push(made + (made === 1 ? " token in " : " tokens in ") + seconds(took));
  }
  if (first !== null) said.push("the first after " + seconds(first));
  if (usage?.prompt_tokens_details?.cached_tokens) said.push(usage.prompt_tokens_details.cached_tokens + " of the prompt read before");
  if (ENDS[reason]) said.push(ENDS[reason]);
  if (earlier) said.push("earlier turns went along");
  return said.join(", ");
}
