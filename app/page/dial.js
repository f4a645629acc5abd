// What each number of steps gains and costs: a sentence beside the slider, and a table of all numbers.

import { element } from "./picture.js";
import { $ } from "./service.js";

let rows = []; // one per number of steps, 0 first

const written = (value, digits) => (value === null ? "–" : value.toFixed(digits));
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(4)}`;
const interval = (row) => `${signed(row.gain_low)} to ${signed(row.gain_high)}`;

export function offerSteps(model) {
  rows = model.by_steps;
  $("by-steps-rows").replaceChildren(...rows.map((row) => element("tr", "",
    element("td", "", `${row.reasoning_steps}`),
    element("td", "number", written(row.ndcg_at_10, 4)),
    element("td", "number", row.gain === null ? "–" : `${signed(row.gain)} (${interval(row)})`),
    element("td", "number", written(row.median_ms, 1)))));
  $("by-steps-source").textContent = `${measured(rows.at(-1))} ${auto()}`;
}

function measured({ users, of, detectable }) {
  if (users === null) return "Accuracy was not measured for this model.";
  const sample = of === null ? users.toLocaleString() : `${users.toLocaleString()} of ${of.toLocaleString()}`;
  const power = detectable === null ? "" : `, who would show a gain of ${detectable.toFixed(4)} or more`;
  return `Accuracy is that of ${sample} validation users at export${power}.`;
}

function auto() {
  if (rows.every((row) => row.gain === null)) return "Gains were not measured, so reasoning_steps=auto takes as many steps as the time budget permits.";
  const worthwhile = rows.filter((row) => row.auto && row.reasoning_steps).map((row) => row.reasoning_steps).reverse();
  return worthwhile.length ? `reasoning_steps=auto takes ${worthwhile.join(", ")} or none, as the time budget permits.`
    : "reasoning_steps=auto takes none, because no number of steps gains more than chance.";
}

export const worth = (steps) => (rows[steps] ? `${gain(rows[steps])} ${time(rows[steps])}` : "");

function gain(row) {
  if (!row.reasoning_steps) return rows.length > 1 ? "The model names items at once; move the slider to compare with more steps." : "The model names items at once.";
  if (row.gain === null) return "What steps gain was not measured for this model.";
  const found = row.gain_low > 0 ? "More accurate than without reasoning" : row.gain_high < 0 ? "Less accurate than without reasoning" : "No gain distinguishable from chance";
  return `${found}: NDCG@10 ${signed(row.gain)}, 95% interval ${interval(row)}.`;
}

function time(row) {
  if (row.median_ms === null) return "How long a search takes was not measured yet.";
  const without = row.reasoning_steps && rows[0].median_ms !== null ? `, and ${rows[0].median_ms.toFixed(1)} ms without reasoning` : "";
  return `A search takes ${row.median_ms.toFixed(1)} ms here${without}.`;
}
