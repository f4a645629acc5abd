// Requests to the service, the notice that says what went wrong, and small things that every page needs.

import { element } from "./picture.js";

let waiting = null; // the timer of the next attempt after a refusal

export const $ = (id) => document.getElementById(id);
export const label = (item) => item.title || item.item_id;
export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

class Refused extends Error {
  constructor(status, problem, wait) {
    super(problem.detail || problem.title || `The service answered with status ${status}.`);
    Object.assign(this, { status, title: problem.title, wait });
  }
}

export async function call(path, options = {}) {
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

export function later(action, wait) {
  let timer;
  return () => { clearTimeout(timer); timer = setTimeout(action, wait); };
}

// Errors are shown in one notice; requests that may succeed later are sent again.

export function showError(error, retry) {
  if (error.name === "AbortError") return;
  hideNotice();
  const message = element("p", "", element("strong", "", error.title || "Something went wrong"), ` ${error.message}`);
  $("notice").replaceChildren(message);
  $("notice").hidden = false;
  if (error.status === 401 || error.status === 403) {
    $("key").closest("details")?.setAttribute("open", "");
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

export function hideNotice() {
  clearTimeout(waiting);
  $("notice").hidden = true;
}

// Sends a body as JSON.
export const send = (method, path, body, options = {}) => call(path, {
  method, ...options, ...(body !== undefined && { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } }),
});
