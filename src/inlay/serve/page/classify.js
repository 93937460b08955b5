// A pasted text, and the probability of each label.

import { ask } from "./api.js";
import { $, el, fill, percent, span } from "./dom.js";

const SHOWN = 10;
const TITLE = 200;

export function offerLabels(names) {
  fill($("labeller"), names);
  $("no-labels").hidden = names.length > 0;
  $("classify").hidden = names.length === 0;
}

export function startClassify() {
  $("classify").addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = event.submitter;
    if (button) button.disabled = true;
    try {
      const input = given($("reading").value, $("text").value);
      const answer = await ask("v1/classify", { model: $("labeller").value, input });
      $("labels").replaceChildren(...answer.data.map((found, n) => table(found, input[n], input.length)));
    } catch (error) {
      $("labels").replaceChildren(el("p", { class: "bad", text: error.message }));
    }
    if (button) {
      const lost = document.activeElement === document.body;
      button.disabled = false;
      if (lost) button.focus();
    }
  });
}

/** The texts, or the row. Throws an error whose words say what is wrong. */
function given(reading, text) {
  if (!text.trim()) throw new Error("Paste a text first.");
  if (reading === "lines") return text.split("\n").filter((line) => line.trim());
  if (reading === "text") return [text];
  let row = null;
  try {
    row = JSON.parse(text);
  } catch {
    // said below
  }
  if (row === null || typeof row !== "object" || Array.isArray(row)) throw new Error('This is no row. Write {"column": "value"}.');
  return [row];
}

function table(found, text, count) {
  const said = typeof text === "string" ? text : JSON.stringify(text);
  const title = count > 1 ? said.slice(0, TITLE) + (said.length > TITLE ? " …" : "") : "Probability of each label";
  if (found.problem) return el("p", { class: "bad", text: (count > 1 ? title + ": " : "") + found.problem });
  if (!found.probabilities) {
    const words = found.tags ? found.tags.join(" ") : String(Number(found.value.toPrecision(6)));
    return el("p", { text: (count > 1 ? title + ": " : "") + words });
  }
  const best = Object.entries(found.probabilities).sort((a, b) => b[1] - a[1]);
  const made = el("div", {}, rows(best.slice(0, SHOWN), title, found.label));
  if (best.length > SHOWN) {
    const rest = best.length - SHOWN;
    made.append(el("details", {}, el("summary", { text: rest + " more" }), rows(best.slice(SHOWN), "Less probable labels", null)));
  }
  return made;
}

function rows(pairs, title, chosen) {
  const made = pairs.map(([label, share]) => {
    const track = el("div", { class: "track", "aria-hidden": "true" }, span(0, share));
    const cells = [el("th", { scope: "row", text: label }), el("td", {}, track), el("td", { class: "n", text: percent(share) })];
    return el("tr", { class: label === chosen ? "first" : null }, ...cells);
  });
  return el("table", { class: "bars" }, el("caption", { text: title }), el("tbody", {}, ...made));
}
