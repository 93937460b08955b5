// Elements and words. Text is only ever set as text: an adapter's name or an answer is no markup.

export const $ = (id) => document.getElementById(id);

/** An element with `settings` (class, text, or attributes) and children. */
export function el(tag, settings = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(settings)) {
    if (name === "text") made.textContent = value;
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Say something in a status line; a refusal in red. */
export function say(place, words, bad = false) {
  place.textContent = words;
  place.classList.toggle("bad", bad);
}

/** The options of a select, changed only where they differ, so that an open list stays; the choice stays if it can. */
export function fill(select, values, none = null, chosen = null) {
  const wanted = none === null ? values : ["", ...values];
  const there = [...select.options].map((option) => option.value);
  if (there.length === wanted.length && there.every((value, n) => value === wanted[n])) return;
  const before = there.length ? select.value : chosen;
  select.replaceChildren(...wanted.map((value) => el("option", { value, text: value || none })));
  if (before !== null && wanted.includes(before)) select.value = before;
}

export const percent = (share) => (share * 100).toFixed(1) + " %";

export function bytes(count) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["KB", 1e3]]) {
    if (count >= size) return (count / size).toFixed(count / size < 10 ? 1 : 0) + " " + unit;
  }
  return count + " B";
}

export function seconds(ms) {
  return ms < 1000 ? Math.round(ms) + " ms" : (ms / 1000).toFixed(1) + " s";
}

/** A bar from `start` to `end`, both shares of the track. */
export function span(start, end) {
  const made = el("i");
  made.style.left = start * 100 + "%";
  made.style.width = Math.max(0, end - start) * 100 + "%";
  return made;
}
