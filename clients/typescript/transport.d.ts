import { Problem } from "./index.js";

export interface Settings {
  /** if the service asks for one */
  key?: string;
  /** ms that a call takes at most, repetitions and the waits before them included; default: 10,000 */
  timeout?: number;
  /** how often a call is repeated at most; default: 2 */
  retries?: number;
  /** sent with every call, such as `traceparent` */
  headers?: Record<string, string>;
  /** in place of the global one */
  fetch?: typeof fetch;
}

export interface Options {
  /** ends the call, and the waits in it */
  signal?: AbortSignal;
}

/** The service did not do what it was asked for. */
export class ServiceError extends Error {
  /** null where no answer came */
  readonly status: number | null;
  readonly problem: Problem | null;
  /** by which the service's log has the request */
  readonly requestId: string | null;
  /** seconds after which another try makes sense; null if none does */
  readonly retryAfter: number | null;
  /** whether surely nothing was done */
  readonly isUndone: boolean;
}

/** Not now: over a quota, overloaded, too late, or not reachable. */
export class Unavailable extends ServiceError {}

/** There is no such user, item, catalogue or model. */
export class NotFound extends ServiceError {}

export class Transport {
  constructor(address: string, settings?: Settings);
}
