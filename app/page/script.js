// The playground: a history made by clicking, every change answered at once.
"use strict";

const STAGES = ["queue", "cache", "encode", "reason", "decode"];
const $ = (id) => document.getElementById(id);
const clicked = []; // items {item_id, title}, oldest first
let running = null; // the request under way; a newer one aborts it

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children.filter((child) => child !== null));
  return made;
}

const label = (item) => item.title || item.item_id;

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if ($("key").value) headers["X-API-Key"] = $("key").value;
  const response = await fetch(path, { ...options, headers });
  const body = await response.json();
  if (!response.ok) throw new Error(body.detail || body.title || `status ${response.status}`);
  return body;
}

function later(action, wait) {
  let timer;
  return () => { clearTimeout(timer); timer = setTimeout(action, wait); };
}

// What the user did

async function suggest() {
  const query = $("query").value.trim();
  try {
    const found = await call(`/items?limit=14&query=${encodeURIComponent(query)}`);
    if (query !== $("query").value.trim()) return; // a newer one is under way
    $("suggestions").replaceChildren(...found.items.map((item) => {
      const button = element("button", "", label(item));
      button.type = "button";
      button.title = item.categories.join(" · ");
      button.addEventListener("click", () => add(item));
      return element("li", "", button);
    }));
    if (!found.items.length) $("suggestions").append(element("li", "empty", "No title holds all of these words."));
  } catch (error) { show(error); }
}

function add(item) {
  clicked.push(item);
  drawHistory();
  recommend();
}

function drawHistory() {
  $("history").replaceChildren(...clicked.map((item, place) => {
    const remove = element("button", "", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${label(item)}`);
    remove.addEventListener("click", () => { clicked.splice(place, 1); drawHistory(); recommend(); });
    return element("li", "", element("span", "", label(item)), remove);
  }));
  if (!clicked.length) $("history").append(element("li", "empty", "Empty: a new user, who gets what is popular."));
}

// The answer

function body() {
  const made = { history: clicked.map((item) => item.item_id), k: Number($("k").value) || 8, explain: true };
  made.beam_width = Math.max(made.k, Number($("beam").value) || 50);
  if ($("user").value) made.user_id = $("user").value;
  if ($("category").value) made.categories = [$("category").value];
  if (Number($("timeout").value) > 0) made.timeout_ms = Number($("timeout").value);
  if (!$("seen").checked) made.exclude_seen = false;
  return made;
}

async function recommend() {
  running?.abort();
  const mine = running = new AbortController();
  const path = `/recommend?reasoning_steps=${$("steps").value}`;
  const sent = JSON.stringify(body());
  document.body.classList.add("busy");
  try {
    const answer = await call(path, {
      method: "POST", body: sent, signal: mine.signal, headers: { "Content-Type": "application/json" },
    });
    $("problem").hidden = true;
    draw(answer);
    const quoted = sent.replaceAll("'", "'\\''");
    $("curl").textContent = `curl -s '${location.origin}${path}' \\\n  -H 'Content-Type: application/json' \\\n  -d '${quoted}'`;
  } catch (error) {
    if (error.name !== "AbortError") show(error);
  } finally {
    if (running === mine) document.body.classList.remove("busy");
  }
}

function show(error) {
  $("problem").textContent = error.message;
  $("problem").hidden = false;
}

function draw(answer) {
  const badge = (text, on) => element("span", on ? "badge on" : "badge", text);
  $("badges").replaceChildren(
    badge(answer.source === "model" ? "model" : "popularity: nothing is known of this user", answer.source === "model"),
    badge(`${answer.reasoning_steps} steps`, answer.reasoning_steps > 0),
    badge(`${answer.items.length} items, beam ${answer.beam_width}`),
    badge(`cache: ${answer.cache}`, answer.cache === "memory" || answer.cache === "redis"),
  );
  drawResults(answer);
  $("details").hidden = false;
  drawTimings(answer.timings_ms);
  drawTrace(answer.explanation);
}

function drawResults(answer) {
  const scores = answer.items.map((item) => item.score);
  const best = Math.max(...scores), worst = Math.min(...scores), span = best - worst || 1;
  $("results").replaceChildren(...answer.items.map((item, place) => {
    const fill = element("i");
    fill.style.width = `${12 + 88 * (item.score - worst) / span}%`;
    const score = element("span", "score", element("span", "meter", fill), item.score.toFixed(2));
    const card = element("button", "",
      element("span", "rank", `${place + 1}`),
      element("span", "title", label(item)),
      element("span", "tags", item.categories.join(" · ")),
      score);
    card.type = "button";
    card.title = "Add to the history";
    card.addEventListener("click", () => add(item));
    return element("li", "", card);
  }));
  if (!answer.items.length) $("results").append(element("li", "empty", "No item is permitted by these rules."));
}

function drawTimings(timings) {
  const known = STAGES.reduce((sum, stage) => sum + timings[stage], 0);
  const parts = [...STAGES.map((stage) => [stage, timings[stage]]), ["other", Math.max(0, timings.total - known)]];
  const whole = Math.max(timings.total, known, 0.001);
  $("total").textContent = `${timings.total.toFixed(1)} ms`;
  $("bar").replaceChildren(...parts.map(([stage, ms]) => {
    const part = element("i", stage);
    part.style.width = `${100 * ms / whole}%`;
    return part;
  }));
  $("legend").replaceChildren(...parts.map(([stage, ms]) =>
    element("li", "", element("i", stage), `${stage} ${ms.toFixed(1)} ms`)));
}

function drawTrace(explanation) {
  if (!explanation) {
    $("trace").replaceChildren(element("li", "empty", "The model was not asked: its history is empty."));
    return;
  }
  $("trace").replaceChildren(...explanation.steps.map((step) => {
    const chance = step.log_probability === null ? "" : ` · ${(100 * Math.exp(step.log_probability)).toFixed(0)}% sure`;
    return element("li", "",
      element("strong", "", step.step === 0 ? "before thinking" : `step ${step.step}${chance}`),
      element("ul", "", ...step.nearest_items.map((item) => element("li", "", label(item)))));
  }));
}

// Start

async function start() {
  drawHistory();
  try {
    const model = (await call("/models")).models.find((each) => each.active);
    $("problem").hidden = true;
    $("model").textContent = `${model.version} · ${model.items.toLocaleString()} items · up to ${model.max_steps} reasoning steps`;
    $("steps").max = model.max_steps;
    $("steps").value = model.max_steps;
    $("beam").max = model.max_beam_width;
    $("category").replaceChildren(new Option("all", ""), ...model.categories.map((each) => new Option(each, each)));
    $("steps-value").textContent = $("steps").value;
    await suggest();
    await recommend();
  } catch (error) {
    show(error);
    $("model").textContent = "not ready";
    setTimeout(start, 2000); // it may still be loading
  }
}

const soon = later(recommend, 150);
$("steps").addEventListener("input", () => { $("steps-value").textContent = $("steps").value; soon(); });
for (const id of ["k", "beam", "timeout", "user"]) $(id).addEventListener("input", soon);
for (const id of ["category", "seen"]) $(id).addEventListener("change", soon);
$("key").addEventListener("change", start);
$("query").addEventListener("input", later(suggest, 120));
$("clear").addEventListener("click", () => { clicked.length = 0; drawHistory(); recommend(); });
$("copy").addEventListener("click", () => navigator.clipboard?.writeText($("curl").textContent));
start();
