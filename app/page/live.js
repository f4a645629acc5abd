// What the service and the people do meanwhile: its metrics, and hits and clicks by model and steps.

import { element, spark } from "./picture.js";
import { readMetrics, since } from "./metrics.js";
import { $, call } from "./service.js";

const POLL = 2000; // ms between two reads of /metrics
const POLL_FEEDBACK = 15000; // ms: these count towards a quota
const KEPT = 60; // values in the live curve
const WINDOW = 15; // reads that the figures next to it cover

const rates = [];
const reads = []; // the newest last

export async function pollMetrics() {
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

export async function pollFeedback() {
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
