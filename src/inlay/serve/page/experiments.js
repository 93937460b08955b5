// Experiments with what is known of each arm. The server shows them to admins alone; without any there is no section.

import { ask } from "./api.js";
import { $, el, percent, seconds, span } from "./dom.js";

const HEADS = ["arm", "feedback, with its interval", "share", "requests", "errors", "first token after", "between tokens"];
let shown = "";

/** Show the experiments, drawn anew only where something has changed. */
export async function showExperiments(allowed) {
  let found = [];
  try {
    found = allowed ? (await ask("v1/experiments")).data : [];
  } catch (error) {
    if (error.status !== 404) throw error; // a server that keeps none
  }
  $("experiments-box").hidden = found.length === 0;
  const now = JSON.stringify(found);
  if (now !== shown) $("experiments").replaceChildren(...found.map(experiment));
  shown = now;
}

function experiment(one) {
  const rows = one.arms.map((arm) => {
    const cells = [percent(arm.share), arm.requests, arm.errors].map((value) => el("td", { class: "n", text: String(value) }));
    const times = ["ttft_ms", "between_ms"].map((name) => el("td", { text: time(arm[name], arm[name + "_interval"]) }));
    return el("tr", {}, el("th", { scope: "row", text: arm.name }), feedback(arm.feedback), ...cells, ...times);
  });
  const heads = HEADS.map((text, n) => el("th", { scope: "col", class: n > 1 && n < 5 ? "n" : null, text }));
  const table = el("table", {}, el("caption", { text: one.name }), el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows));
  const place = el("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Arms of " + one.name }, table);
  const level = Number.isFinite(one.level) ? "Intervals of " + Number((one.level * 100).toFixed(2)) + " %; those of feedback hold however often one looks." : "";
  return el("div", {}, place, ...one.comparisons.map((pair) => el("p", { text: compared(pair) })), el("p", { class: "note", text: level }));
}

function compared(pair) {
  const names = pair.arm + " against " + pair.against + ": ";
  if (!Number.isFinite(pair.difference)) return names + "too little feedback to compare.";
  const range = pair.interval ? " (" + signed(pair.interval[0]) + " to " + signed(pair.interval[1]) + ")" : "";
  const p = pair.p < 0.001 ? "p below 0.001" : "p " + pair.p.toFixed(3);
  const verdict = pair.differs ? "The feedback differs." : "No difference is shown yet.";
  return names + "feedback " + signed(pair.difference) + range + ", " + p + ". " + verdict;
}

const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);

function time(mean, interval) {
  if (!Number.isFinite(mean)) return "–";
  return seconds(mean) + (interval ? " (" + seconds(interval[0]) + " to " + seconds(interval[1]) + ")" : "");
}

function feedback(value) {
  if (!value.n || !Number.isFinite(value.mean)) return el("td", { text: "none yet" });
  const range = value.interval ? " (" + value.interval.map((end) => end.toFixed(2)).join(" to ") + ")" : "";
  const made = el("td", { text: value.mean.toFixed(2) + range + " of " + value.n });
  if (!value.interval) return made;
  const mean = span(value.mean, value.mean);
  mean.className = "mean";
  made.append(el("div", { class: "track interval", "aria-hidden": "true" }, span(...value.interval), mean));
  return made;
}
