// The items that changes have added, changed or hidden so far, whoever made them. Only an admin key may read them.

import { element } from "./picture.js";
import { $, call, label, showError } from "./service.js";

const PAGE = 20; // more items at a click
const MOST = 100; // items in one answer
const NAMES = { added: "Added", changed: "Changed", removed: "Hidden" };
let wanted = PAGE; // items in the list, if there are so many
let known = ""; // position of the newest change that is known of
let shown = ""; // what the list was made from
let reading = 0; // counts up: only what was read last is shown

// Makes the list again if it no longer shows everything up to a position in the log of changes.
export async function drawChanges(position) {
  known = position;
  const [kind, key, mine] = [$("change").value, $("key").value, ++reading];
  const basis = (end) => [end, kind, key, wanted].join("\n");
  if (basis(known) === shown) return;
  const locked = { items: [], next: null, position, empty: "An admin key shows them." };
  const found = key ? await read(kind, wanted).catch((error) => {
    if (error.status === 401 || error.status === 403) return locked;
    throw error;
  }) : locked;
  if (mine !== reading) return;
  shown = basis(found.position); // of the worker that answered, which may not be as far
  $("changes").replaceChildren(...found.items.map(row));
  if (!found.items.length) $("changes").append(element("li", "empty", found.empty ?? "Nothing yet."));
  $("more-changes").hidden = !found.next;
}

async function read(kind, count) {
  const items = [];
  let page = null;
  let position = null;
  do {
    const query = new URLSearchParams({ limit: Math.min(count - items.length, MOST), ...(kind && { change: kind }), ...(page && { after: page.next }) });
    page = await call(`catalogues/changes?${query}`);
    items.push(...page.items);
    position ??= page.position;
  } while (page.next && items.length < count);
  return { items, next: page.next, position };
}

function row(item) {
  const times = [["from", item.available_from], ["until", item.available_until]].filter(([, time]) => time);
  return element("li", "",
    element("small", item.change, NAMES[item.change]),
    element("span", "", label(item), ...times.map(([word, time]) => element("small", "muted", ` ${word} ${when(time)}`))),
    item.changed_at && element("small", "muted number", when(item.changed_at)));
}

const when = (time) => new Date(time).toLocaleString([], { dateStyle: "short", timeStyle: "short" });

function redraw(count) {
  wanted = count;
  drawChanges(known).catch(showError);
}

$("change").addEventListener("change", () => redraw(PAGE));
$("more-changes").addEventListener("click", () => redraw(wanted + PAGE));
