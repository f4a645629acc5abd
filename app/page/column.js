// One of the answers side by side: its list, and how far each item is from its place in the list on the left.

import { element } from "./picture.js";
import { label, plural } from "./service.js";

// shown: {answer, items}, an answer and the items of all its pages. before: the ids on the left, or null. add: takes an item.
export function column({ answer, items }, before, isKept, add) {
  const popular = answer.source === "popularity";
  const name = popular ? "Popular now" : isKept ? "Kept settings" : answer.reasoning_steps ? `After ${plural(answer.reasoning_steps, "step")}` : "Without reasoning";
  const facts = popular ? "Nothing is known about this user" : `${answer.timings_ms.total.toFixed(1)} ms · cache ${answer.cache}`;
  const scores = items.map((item) => item.score);
  const written = (score) => (popular ? score.toFixed(0) : score.toFixed(2).replace("-", "−"));
  const [best, worst] = [Math.max(...scores), Math.min(...scores)];
  const list = element("ol", "results", ...items.map((item, index) => {
    const fill = element("i");
    fill.style.width = `${8 + (92 * (item.score - worst)) / (best - worst || 1)}%`;
    const row = element("button", "",
      element("span", "rank", `${index + 1}`),
      element("span", "title", label(item)),
      before && moved(before.indexOf(item.item_id), index),
      element("span", "tags muted", item.categories.join(" · ")),
      element("span", "meter", fill),
      element("span", "score number muted", written(item.score)));
    row.type = "button";
    row.dataset.item = item.item_id;
    row.title = "Add to the history";
    row.addEventListener("click", () => add(item));
    return element("li", "", row);
  }));
  if (!items.length) list.append(element("li", "empty", "These rules permit no item. Relax them under “Rules and settings”."));
  return element("article", answer.reasoning_steps && !isKept ? "column thought" : "column",
    element("div", "row", element("h3", "", name), element("span", "muted number", facts)), list);
}

function moved(from, to) {
  const [text, words, kind] = from < 0 ? ["new", "not in the list on the left", "up"]
    : from > to ? [`↑${from - to}`, `up by ${from - to}`, "up"]
    : from < to ? [`↓${to - from}`, `down by ${to - from}`, "down"]
    : ["", "unchanged", ""];
  const made = element("span", `moved ${kind}`, element("span", "visually-hidden", words), text);
  made.title = words;
  return made;
}
