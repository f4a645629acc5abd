// The playground: a history is made by clicking, and every change is answered at once, beside another way to answer:
// without reasoning, or with settings that were kept to be compared with.

import { column } from "./column.js";
import { offerSteps, worth } from "./dial.js";
import { bars, element, trajectory } from "./picture.js";
import { pollFeedback, pollMetrics } from "./live.js";
import { $, call, hideNotice, label, later, plural, send, showError } from "./service.js";
import { describe, offer, settings } from "./settings.js";

const EXAMPLE = 3; // items in the history at the start
const SIMILAR = 5; // items of each kind
const clicked = []; // items {item_id, title}, oldest first
let running = null; // the current requests; newer ones abort them
let chosenStep = null; // the step that the picture marks; null: the last
let shown = []; // the lists side by side, the present one last: see `extended`
let kept = null; // settings to compare with; null: the present ones without reasoning

// What the user did

async function suggest() {
  const query = $("query").value.trim();
  try {
    const found = await call(`items?limit=20&query=${encodeURIComponent(query)}`);
    if (query !== $("query").value.trim()) return []; // a newer search is running
    $("suggestions").replaceChildren(...found.items.map((item) => {
      const button = element("button", "", element("span", "", label(item)), element("small", "muted", item.categories[0] ?? ""));
      button.type = "button";
      button.addEventListener("click", () => add(item));
      return element("li", "", button);
    }));
    if (!found.items.length) $("suggestions").append(element("li", "empty", "No title contains all these words. Press Enter to look up an item with this id."));
    return found.items;
  } catch (error) {
    showError(error);
    return [];
  }
}

async function addById(id) {
  try {
    add(await call(`items/${encodeURIComponent(id)}`));
    $("query").value = "";
    suggest();
  } catch (error) {
    if (error.status === 404) error.message = `The catalogue has no item with the id “${id}”.`;
    showError(error);
  }
}

function add(item) {
  clicked.push(item);
  drawHistory();
  recommend();
}

function drawHistory() {
  $("history").replaceChildren(...clicked.map((item, index) => {
    const remove = element("button", "quiet", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${label(item)}`);
    remove.addEventListener("click", () => {
      clicked.splice(index, 1);
      drawHistory();
      recommend();
      ($("history").querySelectorAll("button")[Math.min(index, clicked.length - 1)] ?? $("query")).focus();
    });
    return element("li", "", element("span", "", label(item)), remove);
  }));
  $("clear").hidden = !clicked.length;
  if (!clicked.length) $("history").append(element("li", "empty", "Nothing yet: a new user gets popular items."));
}

// The answers

const body = ({ fields }) => ({ history: clicked.map((item) => item.item_id), ...($("user").value && { user_id: $("user").value }), ...fields });

async function recommend() {
  const mine = begin();
  const present = settings();
  const other = kept ?? (present.steps ? { ...present, steps: 0 } : null);
  try {
    const found = []; // one after the other, so that neither waits in the queue for the other
    if (other) found.push(begun(other, await ask(other, mine)));
    found.push(begun(present, await ask(present, mine, { explain: true })));
    if (running !== mine) return;
    hideNotice();
    shown = found.at(-1).answer.source === "popularity" ? found.slice(-1) : found;
    draw();
    drawTerminal(present);
    setBusy(false);
    await drawSimilar(present.fields, mine.signal);
  } catch (error) {
    if (running === mine) failed(error, recommend);
  }
}

async function more() {
  if ($("columns").ariaBusy === "true") return;
  const [mine, lists] = [begin(), shown];
  try {
    for (const [n, list] of lists.entries()) {
      if (list.after) lists[n] = extended(list, await ask(list.how, mine, { after: list.after }));
    }
    if (running !== mine) return;
    hideNotice();
    drawColumns();
    setBusy(false);
  } catch (error) {
    if (running === mine) failed(error, more);
  }
}

function begin() {
  running?.abort();
  setBusy(true);
  return running = new AbortController();
}

const ask = (how, { signal }, besides) => send("POST", `recommend?reasoning_steps=${how.steps}`, { ...body(how), ...besides }, { signal });

// A list by its settings, the answer that it began with, and its items so far. after: the id of its last page, null at its end.
const begun = (how, answer) => extended({ how, answer, items: [] }, answer);

function extended(list, page) {
  return { ...list, items: [...list.items, ...page.items], after: page.items.length < list.how.fields.k ? null : page.recommendation_id };
}

const setBusy = (isBusy) => { $("columns").ariaBusy = `${isBusy}`; };

function failed(error, retry) {
  setBusy(false);
  showError(error, retry);
}

function draw() {
  const { answer } = shown.at(-1);
  drawColumns();
  const unknown = [...new Set(answer.unknown_items)];
  $("aside").textContent = unknown.length ? `Not in the catalogue, so ignored: ${unknown.join(", ")}` : "";
  $("aside").hidden = !unknown.length;
  drawReasoning(answer);
  $("time").hidden = answer.source === "popularity";
  $("bars").replaceChildren(...bars(shown.map((each) => [plural(each.answer.reasoning_steps, "step"), each.answer.timings_ms])));
}

function drawColumns() {
  const before = shown.length > 1 ? shown[0].items.map((item) => item.item_id) : null;
  $("columns").replaceChildren(...shown.map((each, n) => column(each, n > 0 ? before : null, kept && n < shown.length - 1, add)));
  $("columns").classList.toggle("one", shown.length === 1);
  $("compared").hidden = shown.length === 1;
  $("more-items").hidden = shown.every((each) => !each.after);
}

function drawReasoning(answer) {
  const explanation = answer.explanation;
  const show = Boolean(explanation?.items.length && explanation.items[0].similarity.length > 1);
  $("reasoning").hidden = !show;
  if (!show) return;
  const items = answer.items.map((item) => ({ id: item.item_id, name: label(item) }));
  const similarity = explanation.items.map((item) => item.similarity);
  const last = similarity[0].length - 1;
  const redraw = () => {
    const step = Math.min(chosenStep ?? last, last);
    $("map").replaceChildren(trajectory(Math.round($("map").clientWidth), items, similarity, step));
    $("trace").querySelectorAll("button").forEach((button, n) => button.setAttribute("aria-pressed", n === step));
  };
  $("trace").replaceChildren(...explanation.steps.map((step, n) => {
    const probability = step.log_probability === null ? "" : `token probability ${(100 * Math.exp(step.log_probability)).toFixed(0)}%`;
    const button = element("button", "",
      element("strong", "", n ? `Step ${n}` : "Before"), element("small", "muted", probability),
      element("ul", "", ...step.nearest_items.slice(0, 3).map((item) => element("li", "", label(item)))));
    button.type = "button";
    button.addEventListener("click", () => { chosenStep = n === last ? null : n; redraw(); });
    return element("li", "", button);
  }));
  redraw();
  window.onresize = later(redraw, 100);
}

function drawTerminal(present) {
  const quoted = JSON.stringify(body(present)).replaceAll("'", "'\\''");
  const key = $("key").value ? "  -H 'X-API-Key: …' \\\n" : "";
  $("curl").textContent = `curl -s '${new URL("recommend", location)}?reasoning_steps=${present.steps}' \\\n  -H 'Content-Type: application/json' \\\n${key}  -d '${quoted}'`;
  $("terminal").hidden = false;
}

// Similar to the newest item of the history

async function drawSimilar(fields, signal) {
  const item = clicked.at(-1);
  $("similar").hidden = !item;
  if (!item) return;
  const rules = Object.entries(fields).filter(([name]) => ["categories", "catalogue", "filter"].includes(name));
  const ask = (by) => call(`items/${encodeURIComponent(item.item_id)}/similar?${new URLSearchParams([...rules, ["k", SIMILAR], ...by])}`, { signal });
  const [first, alike] = await Promise.all([ask([]), ask([["by", "content"]])]);
  $("similar-item").textContent = label(item);
  for (const [id, items] of [["together", first.items.filter((each) => each.by === "together")], ["alike", alike.items]]) {
    $(id).parentElement.hidden = !items.length; // a model without an item graph knows none that are taken together
    $(id).replaceChildren(...items.map((each) => {
      const button = element("button", "", element("span", "", label(each)), element("small", "muted number", each.score.toFixed(2)));
      button.type = "button";
      button.dataset.item = each.item_id;
      button.addEventListener("click", () => add(each));
      return element("li", "", button);
    }));
  }
}

// What the answer is compared with

function keep() {
  kept = kept ? null : settings();
  $("compared").textContent = `compared with ${kept ? describe(kept) : "no reasoning"}`;
  $("keep").textContent = kept ? "Compare with no reasoning" : "Keep these settings to compare with";
  recommend();
}

// Start

async function start() {
  try {
    const model = (await call("models")).models.find((each) => each.active);
    hideNotice();
    $("model").textContent = `${model.version} · ${model.items.toLocaleString()} items`;
    $("steps").max = model.max_steps;
    $("steps").value = model.default_steps;
    $("steps").disabled = !model.max_steps;
    $("ticks").replaceChildren(...Array.from({ length: model.max_steps + 1 }, (_, n) => element("span", "", `${n}`)));
    offerSteps(model);
    offer(model, (await call("scenarios")).scenarios);
    drawSteps();
    const popular = await suggest();
    if (!clicked.length) clicked.push(...popular.slice(0, EXAMPLE));
    drawHistory();
    await recommend();
  } catch (error) {
    $("model").textContent = "not ready";
    failed(error, start);
  }
}

function drawSteps() {
  $("steps-value").textContent = plural(Number($("steps").value), "step");
  $("steps").setAttribute("aria-valuetext", $("steps-value").textContent);
  $("worth").textContent = worth(Number($("steps").value));
}

// Pointing at an item highlights it wherever it is shown.
function highlight(event) {
  const id = event.target.closest?.("[data-item]")?.dataset.item;
  for (const each of document.querySelectorAll("[data-item]")) each.classList.toggle("same", each.dataset.item === id);
}

// Arrow keys move between the search field and its results.
function onArrowKey(event) {
  const buttons = [...$("suggestions").querySelectorAll("button")];
  const at = buttons.indexOf(document.activeElement);
  if (event.key === "ArrowDown" && at + 1 < buttons.length) buttons[at + 1].focus();
  else if (event.key === "ArrowUp" && at >= 0) (buttons[at - 1] ?? $("query")).focus();
  else if (event.key === "Escape" && at >= 0) $("query").focus();
  else if (event.key === "Enter" && document.activeElement === $("query") && $("query").value.trim()) {
    if (buttons.length) buttons[0].click();
    else addById($("query").value.trim());
  } else return;
  event.preventDefault();
}

const soon = later(recommend, 120);
$("steps").addEventListener("input", () => { chosenStep = null; drawSteps(); soon(); });
for (const id of ["k", "beam", "timeout", "user", "diversity", "per-category", "explore"]) $(id).addEventListener("input", soon);
for (const id of ["category", "catalogue", "scenario", "seen"]) $(id).addEventListener("change", soon);
for (const id of ["filter", "boost", "factor"]) $(id).addEventListener("input", later(recommend, 600)); // half a filter is a mistake
$("more-items").addEventListener("click", more);
$("keep").addEventListener("click", keep);
$("key").addEventListener("change", start);
$("query").addEventListener("input", later(suggest, 100));
$("query").parentElement.addEventListener("keydown", onArrowKey);
$("clear").addEventListener("click", () => { clicked.length = 0; drawHistory(); recommend(); $("query").focus(); });
$("copy").addEventListener("click", async () => {
  await navigator.clipboard?.writeText($("curl").textContent);
  $("copy").textContent = "Copied";
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
});
for (const id of ["columns", "map"]) {
  for (const kind of ["pointerover", "focusin", "pointerleave"]) $(id).addEventListener(kind, highlight);
}
$("user").value = `visitor-${Math.random().toString(36).slice(2, 8)}`; // with an id, the second answer comes from the cache
drawHistory();
start();
pollMetrics();
pollFeedback();
