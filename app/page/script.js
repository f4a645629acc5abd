// The playground: a history is made by clicking, and every change is answered at once, beside another way to answer:
// without thinking, or with settings that were kept to be compared with.

import { bars, element, trajectory } from "./picture.js";
import { pollFeedback, pollMetrics } from "./live.js";
import { $, call, hideNotice, label, later, plural, send, showError } from "./service.js";

const EXAMPLE = 3; // items in the history at the start
const SIMILAR = 5; // items of each kind
const clicked = []; // items {item_id, title}, oldest first
let running = null; // the current requests; newer ones abort them
let chosenStep = null; // the step that the picture marks; null: the last
let kept = null; // settings to compare with; null: the present ones without thinking

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

// Steps, and the fields of a request; what is left empty is left out.
function settings() {
  const fields = { k: Number($("k").value) || 8 };
  fields.beam_width = Math.max(fields.k, Number($("beam").value) || 50);
  const set = {
    diversity: Number($("diversity").value), max_per_category: Number($("per-category").value), filter: $("filter").value.trim(),
    categories: $("category").value && [$("category").value], catalogue: $("catalogue").value, timeout_ms: Math.max(0, Number($("timeout").value)),
  };
  for (const [name, value] of Object.entries(set)) if (value) fields[name] = value;
  if (!$("seen").checked) fields.exclude_seen = false;
  return { steps: Number($("steps").value), fields };
}

const body = ({ fields }) => ({ history: clicked.map((item) => item.item_id), ...($("user").value && { user_id: $("user").value }), ...fields });

async function recommend() {
  running?.abort();
  const mine = running = new AbortController();
  const present = settings();
  const other = kept ?? (present.steps ? { ...present, steps: 0 } : null);
  const ask = (how, explain) => send("POST", `recommend?reasoning_steps=${how.steps}`, { ...body(how), ...(explain && { explain }) }, { signal: mine.signal });
  $("columns").setAttribute("aria-busy", "true");
  try {
    const answers = []; // one after the other, so that neither waits in the queue for the other
    if (other) answers.push(await ask(other, false));
    answers.push(await ask(present, true));
    if (running !== mine) return;
    hideNotice();
    draw(answers);
    drawTerminal(present);
    $("columns").setAttribute("aria-busy", "false");
    await drawSimilar(present.fields, mine.signal);
  } catch (error) {
    if (running === mine) failed(error, recommend);
  }
}

function failed(error, retry) {
  $("columns").setAttribute("aria-busy", "false");
  showError(error, retry);
}

function draw(answers) {
  const last = answers.at(-1);
  const popular = last.source === "popularity";
  const shown = popular ? [last] : answers;
  const before = shown.length > 1 ? shown[0].items.map((item) => item.item_id) : null;
  $("columns").replaceChildren(...shown.map((answer, n) => column(answer, n > 0 ? before : null, kept && n < shown.length - 1)));
  $("columns").classList.toggle("one", shown.length === 1);
  const unknown = [...new Set(last.unknown_items)];
  $("aside").textContent = unknown.length ? `Not in the catalogue, so ignored: ${unknown.join(", ")}` : "";
  $("aside").hidden = !unknown.length;
  drawReasoning(last);
  $("time").hidden = popular;
  $("bars").replaceChildren(...bars(shown.map((answer) => [plural(answer.reasoning_steps, "step"), answer.timings_ms])));
}

function column(answer, before, isKept) {
  const popular = answer.source === "popularity";
  const name = popular ? "Popular now" : isKept ? "Kept settings" : answer.reasoning_steps ? `After ${plural(answer.reasoning_steps, "step")}` : "Without thinking";
  const facts = popular ? "Nothing is known about this user" : `${answer.timings_ms.total.toFixed(1)} ms · cache ${answer.cache}`;
  const scores = answer.items.map((item) => item.score);
  const written = (score) => (popular ? score.toFixed(0) : score.toFixed(2).replace("-", "−"));
  const [best, worst] = [Math.max(...scores), Math.min(...scores)];
  const list = element("ol", "results", ...answer.items.map((item, index) => {
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
  if (!answer.items.length) list.append(element("li", "empty", "These rules permit no item. Relax them under “Rules and settings”."));
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
    const sure = step.log_probability === null ? "" : `${(100 * Math.exp(step.log_probability)).toFixed(0)}% sure`;
    const button = element("button", "",
      element("strong", "", n ? `Step ${n}` : "Before"), element("small", "muted", sure),
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

// Beside the item of the history that is the newest

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
  const { steps, fields } = kept ?? {};
  const parts = kept && [plural(steps, "step"), ...Object.entries(fields).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`)];
  $("compared").textContent = kept ? `compared with ${parts.join(" · ")}` : "compared with no thinking";
  $("keep").textContent = kept ? "Compare with no thinking" : "Keep these settings to compare with";
  recommend();
}

// Start

async function start() {
  try {
    const model = (await call("models")).models.find((each) => each.active);
    hideNotice();
    $("model").textContent = `${model.version} · ${model.items.toLocaleString()} items`;
    $("steps").max = model.max_steps;
    $("steps").value = model.max_steps;
    $("steps").disabled = !model.max_steps;
    $("ticks").replaceChildren(...Array.from({ length: model.max_steps + 1 }, (_, n) => element("span", "", `${n}`)));
    $("beam").max = model.max_beam_width;
    $("k").max = model.max_beam_width;
    for (const [id, names] of [["category", model.categories], ["catalogue", model.catalogues]]) {
      $(id).replaceChildren(new Option("all", ""), ...names.map((each) => new Option(each, each)));
      $(id).parentElement.hidden = !names.length;
    }
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
for (const id of ["k", "beam", "timeout", "user", "diversity", "per-category"]) $(id).addEventListener("input", soon);
for (const id of ["category", "catalogue", "seen"]) $(id).addEventListener("change", soon);
$("filter").addEventListener("input", later(recommend, 600)); // half a filter is a mistake
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
