// The operator's page: versions and who is answered by them, items, and what people do with the answers. Reading needs
// no more than any key; changes need an admin key.

import { drawChanges } from "./changes.js";
import { element } from "./picture.js";
import { pollFeedback } from "./live.js";
import { $, call, hideNotice, label, later, plural, send, showError } from "./service.js";

const POLL = 5000; // ms between two reads of versions and catalogue
let models = [];
let traffic = { active: "", name: "", arms: [], shadow: null };
let timer = null;

// One change at a time: what came of it is said, and everything is read again.
async function change(button, work, said) {
  button.disabled = true;
  $("said").hidden = true;
  try {
    const result = await work();
    hideNotice();
    $("said").textContent = said(result);
    $("said").hidden = false;
    await refresh();
    return true;
  } catch (error) {
    showError(error);
    return false;
  } finally {
    button.disabled = false;
  }
}

async function refresh() {
  clearTimeout(timer);
  timer = setTimeout(refresh, POLL);
  if (document.hidden && models.length) return;
  try {
    const catalogue = await call("catalogues");
    models = (await call("models")).models;
    traffic = await call("traffic");
    drawVersions();
    drawCatalogue(catalogue);
    await drawChanges(catalogue.position);
  } catch (error) {
    $("model").textContent = "not ready";
    clearTimeout(timer); // a key is missing, or the notice counts down to the next attempt
    showError(error, refresh);
  }
}

// Versions

function drawVersions() {
  $("model").textContent = traffic.active;
  $("versions").replaceChildren(...models.map((model) => {
    const steps = model.accuracy.find((each) => each.steps === model.default_steps);
    const accuracy = steps?.["ndcg@10"];
    return element("tr", "",
      element("td", "", model.version),
      element("td", "", answers(model)),
      element("td", "number", model.items.toLocaleString()),
      element("td", "number", `${model.default_steps} of ${model.max_steps}`),
      element("td", "number", accuracy === undefined ? "–" : accuracy.toFixed(4)),
      element("td", "", ...(model.active ? [] : [
        action("Activate", model, () => send("POST", `models/${encodeURIComponent(model.version)}/activate`), "answers from now on."),
        action("Unload", model, () => send("DELETE", `models/${encodeURIComponent(model.version)}`), "is unloaded."),
      ])));
  }));
}

function answers(model) {
  const arms = traffic.arms.filter((arm) => arm.version === model.version);
  const parts = arms.map((arm) => `${arm.percent}%${arm.reasoning_steps === null ? "" : ` with ${plural(arm.reasoning_steps, "step")}`}`);
  if (model.active) parts.push(traffic.arms.length ? "everybody else" : "everybody");
  if (traffic.shadow?.version === model.version) parts.push(`nobody, as the shadow of ${traffic.shadow.percent}%`);
  return parts.join(", ") || "nobody";
}

function action(name, model, work, said) {
  const button = element("button", "quiet", name);
  button.type = "button";
  button.setAttribute("aria-label", `${name} ${model.version}`);
  button.addEventListener("click", () => change(button, work, () => `${model.version} ${said}`));
  return button;
}

$("load").addEventListener("submit", (event) => {
  event.preventDefault();
  change(event.submitter, () => send("POST", "models", { path: $("path").value }), (model) => `${model.version} is loaded and answers nobody yet.`);
});

// The split. It is a form, so what is read meanwhile leaves it alone.

function drawSplit() {
  $("experiment").value = traffic.name;
  $("arms").replaceChildren(...traffic.arms.map(armRow));
}

function armRow({ version, percent, reasoning_steps: steps }) {
  const choose = element("select", "", ...models.map((model) => new Option(model.version, model.version, false, model.version === version)));
  const number = (value, least, most, placeholder) => Object.assign(element("input", ""), { type: "number", min: least, max: most, step: "any", value: value ?? "", placeholder });
  const remove = element("button", "quiet", "×");
  Object.assign(remove, { type: "button" }).setAttribute("aria-label", "Remove this arm");
  const percentage = number(percent, 0, 100, "");
  percentage.required = true;
  const row = element("li", "",
    element("label", "field", "Version", choose), element("label", "field", "Percent", percentage),
    element("label", "field", "Steps", number(steps, 0, 100, "default")), remove);
  remove.addEventListener("click", () => { row.remove(); $("add-arm").focus(); });
  return row;
}

$("add-arm").addEventListener("click", () => {
  const row = armRow({ version: traffic.active, percent: 10, reasoning_steps: null });
  $("arms").append(row);
  row.querySelector("select").focus();
});

$("split").addEventListener("submit", (event) => {
  event.preventDefault();
  const arms = [...$("arms").children].map((row) => {
    const [version, percent, steps] = row.querySelectorAll("select, input");
    return { version: version.value, percent: Number(percent.value), reasoning_steps: steps.value === "" ? null : Number(steps.value) };
  });
  change(event.submitter, () => send("PUT", "traffic", { name: $("experiment").value, arms, shadow: traffic.shadow }), () => (arms.length ? "Users are split." : "The active version answers everybody."));
});

// Items

function drawCatalogue(catalogue) {
  const figures = [
    ["Can be recommended", catalogue.items.toLocaleString()],
    ["Named catalogues", catalogue.catalogues.length],
    ["Changes applied up to", `${catalogue.lag_seconds.toFixed(1)} s ago`],
    ["Changes are", catalogue.durable ? "kept" : "lost at a restart"],
  ];
  $("catalogue").replaceChildren(...figures.map(([name, value]) => element("div", "", element("dt", "muted", name), element("dd", "number", `${value}`))));
}

$("put").addEventListener("submit", async (event) => {
  event.preventDefault();
  const [id, title] = [$("item-id").value, $("item-title").value];
  const categories = $("item-categories").value.split(",").map((each) => each.trim()).filter(Boolean);
  const body = { title, categories, brand: $("item-brand").value || null, description: $("item-description").value || null };
  const done = await change(event.submitter, () => send("PUT", `items/${encodeURIComponent(id)}`, body), () => `“${title}” can be recommended from now on.`);
  if (!done) return;
  event.target.reset();
  find();
});

async function find() {
  const query = $("query").value.trim();
  try {
    const { items } = query ? await call(`items?limit=8&query=${encodeURIComponent(query)}`) : { items: [] };
    if (query !== $("query").value.trim()) return; // a newer search is running
    $("found").replaceChildren(...items.map((item) => {
      const hide = element("button", "quiet", "Hide");
      hide.type = "button";
      hide.setAttribute("aria-label", `Hide ${label(item)}`);
      hide.addEventListener("click", async () => {
        const done = await change(hide, () => send("DELETE", `items/${encodeURIComponent(item.item_id)}`), () => `“${label(item)}” is in no answer from now on.`);
        if (!done) return;
        await find();
        $("query").focus();
      });
      return element("li", "", element("span", "", label(item)), hide);
    }));
    if (query && !items.length) $("found").append(element("li", "empty", "No title contains all these words."));
  } catch (error) {
    showError(error);
  }
}

// Start

async function start() {
  hideNotice();
  await refresh();
  drawSplit();
}

$("query").addEventListener("input", later(find, 150));
$("key").addEventListener("change", start);
start();
pollFeedback();
