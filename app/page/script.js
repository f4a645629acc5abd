// The playground: a history is made by clicking, and every change is answered at once, with and without thinking.

import { bars, element, spark, trajectory } from "./picture.js";
import { readMetrics, since } from "./metrics.js";

const $ = (id) => document.getElementById(id);
const EXAMPLE = 3; // items in the history at the start
const POLL = 2000; // ms between two reads of /metrics
const POLL_FEEDBACK = 15000; // ms: these count towards a quota
const KEPT = 60; // values in the live curve
const WINDOW = 15; // reads that the figures next to it cover
const clicked = []; // items {item_id, title}, oldest first
let running = null; // the current requests; newer ones abort them
let waiting = null; // the timer of the next attempt after a refusal
let chosenStep = null; // the step that the picture marks; null: the last

const label = (item) => item.title || item.item_id;
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

class Refused extends Error {
  constructor(status, problem, wait) {
    super(problem.detail || problem.title || `The service answered with status ${status}.`);
    Object.assign(this, { status, title: problem.title, wait });
  }
}

async function call(path, options = {}) {
  const headers = { ...options.headers, ...($("key").value && { "X-API-Key": $("key").value }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, { title: "Not reachable", detail: "The service cannot be reached." }, 2);
  }
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  throw new Refused(response.status, body, Number(response.headers.get("Retry-After")) || null);
}

function later(action, wait) {
  let timer;
  return () => { clearTimeout(timer); timer = setTimeout(action, wait); };
}

// Errors are shown in one notice; requests that may succeed later are sent again.

function showError(error, retry) {
  if (error.name === "AbortError") return;
  hideNotice();
  const message = element("p", "", element("strong", "", error.title || "Something went wrong"), ` ${error.message}`);
  $("notice").replaceChildren(message);
  $("notice").hidden = false;
  $("columns").setAttribute("aria-busy", "false");
  if (error.status === 401 || error.status === 403) {
    $("more").open = true;
    $("key").focus();
  }
  if (error.wait && retry) {
    const count = element("span", "muted");
    $("notice").append(count);
    const tick = (left) => {
      if (left <= 0) return retry();
      count.textContent = `Trying again in ${left} s`;
      waiting = setTimeout(tick, 1000, left - 1);
    };
    tick(Math.min(error.wait, 30));
  }
}

function hideNotice() {
  clearTimeout(waiting);
  $("notice").hidden = true;
}

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

function body(explain) {
  const made = { history: clicked.map((item) => item.item_id), k: Number($("k").value) || 8 };
  made.beam_width = Math.max(made.k, Number($("beam").value) || 50);
  if ($("user").value) made.user_id = $("user").value;
  if ($("category").value) made.categories = [$("category").value];
  if ($("catalogue").value) made.catalogue = $("catalogue").value;
  if (Number($("timeout").value) > 0) made.timeout_ms = Number($("timeout").value);
  if (!$("seen").checked) made.exclude_seen = false;
  if (explain) made.explain = true;
  return JSON.stringify(made);
}

async function recommend() {
  running?.abort();
  const mine = running = new AbortController();
  const steps = Number($("steps").value);
  const ask = (count, explain) => call(`recommend?reasoning_steps=${count}`, {
    method: "POST", body: body(explain), signal: mine.signal, headers: { "Content-Type": "application/json" },
  });
  $("columns").setAttribute("aria-busy", "true");
  try {
    const answers = []; // one after the other, so that neither waits in the queue for the other
    if (steps) answers.push(await ask(0, false));
    answers.push(await ask(steps, true));
    if (running !== mine) return;
    hideNotice();
    draw(answers);
    drawTerminal(steps);
    $("columns").setAttribute("aria-busy", "false");
  } catch (error) {
    if (running === mine) showError(error, recommend);
  }
}

function draw(answers) {
  const last = answers.at(-1);
  const popular = last.source === "popularity";
  const shown = popular ? [last] : answers;
  const before = shown.length > 1 ? shown[0].items.map((item) => item.item_id) : null;
  $("columns").replaceChildren(...shown.map((answer, n) => column(answer, n > 0 ? before : null)));
  $("columns").classList.toggle("one", shown.length === 1);
  const unknown = [...new Set(last.unknown_items)];
  $("aside").textContent = unknown.length ? `Not in the catalogue, so ignored: ${unknown.join(", ")}` : "";
  $("aside").hidden = !unknown.length;
  drawReasoning(last);
  $("time").hidden = popular;
  $("bars").replaceChildren(...bars(shown.map((answer) => [plural(answer.reasoning_steps, "step"), answer.timings_ms])));
}

function column(answer, before) {
  const popular = answer.source === "popularity";
  const name = popular ? "Popular now" : answer.reasoning_steps ? `After ${plural(answer.reasoning_steps, "step")}` : "Without thinking";
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
  return element("article", answer.reasoning_steps ? "column thought" : "column",
    element("div", "row", element("h3", "", name), element("span", "muted number", facts)), list);
}

function moved(from, to) {
  const [text, words, kind] = from < 0 ? ["new", "not in the list without thinking", "up"]
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

function drawTerminal(steps) {
  const quoted = body(false).replaceAll("'", "'\\''");
  const key = $("key").value ? "  -H 'X-API-Key: …' \\\n" : "";
  $("curl").textContent = `curl -s '${new URL("recommend", location)}?reasoning_steps=${steps}' \\\n  -H 'Content-Type: application/json' \\\n${key}  -d '${quoted}'`;
  $("terminal").hidden = false;
}

// Live metrics

const rates = [];
const reads = []; // the newest last

async function pollMetrics() {
  setTimeout(pollMetrics, POLL);
  if (document.hidden) { reads.length = 0; return; }
  try {
    const response = await fetch("metrics");
    if (!response.ok) return;
    const now = readMetrics(await response.text());
    reads.push(now);
    if (reads.length < 2) return;
    if (reads.length > WINDOW) reads.shift();
    rates.push(since(reads.at(-2), now).rate);
    if (rates.length > KEPT) rates.shift();
    $("spark").replaceChildren(spark(rates, KEPT));
    drawFigures(since(reads[0], now), now);
  } catch { reads.length = 0; } // no notice: the next request shows one
}

function drawFigures(change, now) {
  const share = (count) => (now.cache.lookups ? `${((100 * count) / now.cache.lookups).toFixed(0)}%` : "–");
  const figures = [
    ["Requests per second", rates.at(-1).toFixed(1)],
    ["95% answered within", change.p95 === null ? "–" : `${change.p95} ms`],
    ["Cache hits in process", share(now.cache.memory)],
    ["Cache hits in Redis", share(now.cache.redis)],
    ["Searches in the queue", `${now.waiting}`],
    ["Searches per batch", change.batch === null ? "–" : change.batch.toFixed(1)],
  ];
  $("live").replaceChildren(...figures.map(([name, value]) => element("div", "", element("dt", "muted", name), element("dd", "number", value))));
}

// Feedback, by model and steps

async function pollFeedback() {
  setTimeout(pollFeedback, POLL_FEEDBACK);
  if (document.hidden) return;
  try {
    const { summaries } = await call("feedback/summary");
    $("feedback").hidden = !summaries.some((each) => Object.values(each.events).some((count) => count > 0));
    $("feedback-rows").replaceChildren(...summaries.map((each) => element("tr", "",
      element("td", "", each.source === "model" ? each.version : `${each.version}, popular items`),
      element("td", "", `${each.reasoning_steps}`),
      element("td", "number", each.recommendations.toLocaleString()),
      element("td", "number", interval(each.hit_rate)),
      element("td", "number", interval(each.click_through_rate)))));
  } catch { $("feedback").hidden = true; } // no notice: the next request shows one
}

function interval(rate) {
  const percent = (share) => (100 * share).toFixed(1);
  return rate ? `${percent(rate.share)}% (${percent(rate.low)}–${percent(rate.high)})` : "–";
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
    showError(error, start);
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
for (const id of ["k", "beam", "timeout", "user"]) $(id).addEventListener("input", soon);
for (const id of ["category", "catalogue", "seen"]) $(id).addEventListener("change", soon);
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
