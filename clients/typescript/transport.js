// How the client's calls travel: with a key, within a time, repeated where that helps, and with errors as exceptions.

const PAUSE = 100; // ms before the first repetition of a call that did not reach the service; doubled for each further one
const JITTER = 0.2; // share by which a wait is lengthened at most, so that clients refused together do not return together
const UNAVAILABLE = [429, 502, 503, 504];
// A store that failed may have stored all the same; every other 429 and 503 comes before anything is done.
const PERHAPS_DONE = "urn:streamrec:problem:store-unavailable";

export class ServiceError extends Error {
  constructor(message, { problem = null, requestId = null, retryAfter = null, isUndone = false, cause } = {}) {
    super(message, { cause });
    Object.assign(this, { name: new.target.name, problem, status: problem?.status ?? null, requestId, retryAfter, isUndone });
  }
}

export class Unavailable extends ServiceError {}

export class NotFound extends ServiceError {}

export const segment = encodeURIComponent;

export class Transport {
  #address;
  #settings;

  constructor(address, { key, timeout = 10_000, retries = 2, headers = {}, fetch = globalThis.fetch } = {}) {
    this.#address = address.replace(/\/+$/, "");
    this.#settings = { timeout, retries, fetch, headers: { ...headers, ...(key && { "X-API-Key": key }) } };
  }

  async call(method, path, { body, query = {}, isRepeatable, signal }) {
    const { timeout, retries, fetch, headers } = this.#settings;
    const end = performance.now() + timeout;
    const url = `${this.#address}${path}${search(query)}`;
    const request = { method, headers: { ...headers, ...(body && { "Content-Type": "application/json" }) }, body: body && JSON.stringify(body) };
    for (let attempt = 0; ; attempt++) {
      const late = AbortSignal.timeout(Math.max(1, Math.ceil(end - performance.now())));
      const failure = await fetch(url, { ...request, signal: signal ? AbortSignal.any([signal, late]) : late }).then(
        async (response) => (response.ok ? { answer: await read(response) } : refusal(response)),
        (error) => {
          if (signal?.aborted) throw error;
          return new Unavailable(`The service cannot be reached: ${error.cause?.message ?? error.message}.`, { retryAfter: (PAUSE * 2 ** attempt) / 1000, isUndone: error.cause?.code === "ECONNREFUSED", cause: error });
        },
      );
      if (!(failure instanceof ServiceError)) return failure.answer;
      const wait = 1000 * failure.retryAfter * (1 + JITTER * Math.random());
      const mayRepeat = attempt < retries && failure.retryAfter !== null && (isRepeatable || failure.isUndone);
      if (!mayRepeat || performance.now() + wait >= end) throw failure;
      await pause(wait, signal);
    }
  }
}

function search(query) {
  const pairs = Object.entries(query).flatMap(([name, value]) => [value].flat().filter((each) => each != null).map((each) => [name, String(each)]));
  return pairs.length ? `?${new URLSearchParams(pairs)}` : "";
}

async function read(response) {
  const text = await response.text();
  return text ? JSON.parse(text) : undefined;
}

async function refusal(response) {
  const { status, statusText, headers } = response;
  const isOurs = headers.get("Content-Type") === "application/problem+json"; // else it is a proxy's
  const problem = isOurs ? await response.json() : { type: "about:blank", title: statusText, status, detail: "" };
  const wait = headers.get("Retry-After") ?? "";
  const Kind = UNAVAILABLE.includes(status) ? Unavailable : status === 404 ? NotFound : ServiceError;
  return new Kind(problem.detail || `${status} ${problem.title}`, {
    problem,
    requestId: headers.get("X-Request-ID"),
    retryAfter: /^\d+$/.test(wait) ? Number(wait) : null,
    isUndone: (status === 429 || status === 503) && problem.type !== PERHAPS_DONE,
  });
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => { clearTimeout(timer); reject(signal.reason); };
    const timer = setTimeout(() => { signal?.removeEventListener("abort", stop); resolve(); }, ms);
    signal?.addEventListener("abort", stop, { once: true });
  });
}
