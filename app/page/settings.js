// What the controls under “Rules and settings” make of a request, and the scenario that presets the rest of it.

import { $, plural } from "./service.js";

const NUMBERS = { k: "k", beam: "beam_width", diversity: "diversity", "per-category": "max_per_category", explore: "explore", timeout: "timeout_ms" };
const PLACEHOLDERS = Object.fromEntries(Object.keys(NUMBERS).map((id) => [id, $(id).placeholder]));
let scenarios = new Map(); // presets by name
const preset = () => scenarios.get($("scenario").value) ?? {};

// Steps, and the fields of a request. What is left empty is left out, but for k and the beam width.
export function settings() {
  const [text, presets] = [(id) => $(id).value.trim(), preset()];
  const number = (id) => Number($(id).value || $(id).placeholder);
  const fields = { k: number("k"), beam_width: Math.max(number("k"), number("beam")) };
  for (const [id, name] of Object.entries(NUMBERS)) if ($(id).value && !(name in fields)) fields[name] = Number($(id).value);
  const named = {
    scenario: $("scenario").value, categories: $("category").value && [$("category").value], catalogue: $("catalogue").value,
    filter: text("filter"), boost: text("boost") && [{ filter: text("boost"), factor: Number($("factor").value) || 2 }],
  };
  for (const [name, value] of Object.entries(named)) if (value) fields[name] = value;
  if ($("seen").checked !== (presets.exclude_seen ?? true)) fields.exclude_seen = $("seen").checked;
  return { steps: Number($("steps").value), fields };
}

export const describe = ({ steps, fields }) => [plural(steps, "step"), ...describeFields(fields)].join(" · ");

function describeFields(fields) {
  return Object.entries(fields).map(([name, value]) => {
    const written = name === "boost" ? value.map((each) => `${each.filter} ×${each.factor}`) : value;
    return `${name.replaceAll("_", " ")} ${Array.isArray(written) && written.length > 3 ? `of ${written.length}` : written}`;
  });
}

// What a model and its operators offer to choose from.
export function offer(model, presets) {
  $("beam").max = $("k").max = model.max_beam_width;
  scenarios = new Map(presets.map(({ name, ...fields }) => [name, fields]));
  const choices = [["category", "all", model.categories], ["catalogue", "all", model.catalogues], ["scenario", "none", [...scenarios.keys()]]];
  for (const [id, none, names] of choices) {
    $(id).replaceChildren(new Option(none, ""), ...names.map((each) => new Option(each, each)));
    $(id).parentElement.hidden = !names.length;
  }
  drawPresets();
}

// Slider and checkbox always say what holds, so a scenario moves them.
function drawPresets() {
  const { reasoning_steps: steps, ...fields } = preset();
  $("presets").textContent = `It presets ${describeFields(fields).join(" · ") || "nothing else"}. What is set here wins.`;
  $("presets").hidden = !$("scenario").value;
  for (const [id, name] of Object.entries(NUMBERS)) $(id).placeholder = fields[name] ?? PLACEHOLDERS[id];
  $("seen").checked = fields.exclude_seen ?? true;
  if (!Number.isInteger(steps)) return;
  $("steps").value = steps;
  $("steps").dispatchEvent(new Event("input"));
}

$("scenario").addEventListener("change", drawPresets);
