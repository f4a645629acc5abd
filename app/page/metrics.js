// Reduces /metrics to a few numbers. Two readings some time apart give rates.

// One reading: totals since the service started.
export function readMetrics(text) {
  const samples = text.split("\n").map((line) => /^(\w+)(?:\{(.*)\})? (\S+)$/.exec(line)).filter(Boolean).map(([, name, labels, value]) => ({
    name, value: Number(value), labels: Object.fromEntries([...(labels ?? "").matchAll(/(\w+)="([^"]*)"/g)].map(([, key, each]) => [key, each])),
  }));
  const answers = (each) => each.labels.route?.startsWith("/recommend");
  const sum = (name, fits = () => true) => samples.reduce((total, each) => total + (each.name === name && fits(each) ? each.value : 0), 0);
  const buckets = new Map(); // upper bound in seconds -> requests within it
  for (const each of samples) {
    if (each.name === "streamrec_request_seconds_bucket" && answers(each)) {
      const bound = each.labels.le === "+Inf" ? Infinity : Number(each.labels.le);
      buckets.set(bound, (buckets.get(bound) ?? 0) + each.value);
    }
  }
  const accesses = (tier, results) => sum("streamrec_cache_total", (each) => each.labels.tier === tier && results.includes(each.labels.result));
  const [memory, redis] = [accesses("memory", ["hit"]), accesses("redis", ["hit"])];
  const lookups = Math.max(...["memory", "redis"].map((tier) => accesses(tier, ["hit", "miss", "stale", "invalid", "error"])));
  return {
    at: performance.now(),
    requests: sum("streamrec_request_seconds_count", answers),
    buckets,
    cache: { memory, redis, lookups },
    waiting: sum("streamrec_queue_depth"),
    batches: sum("streamrec_batch_size_count"),
    searches: sum("streamrec_batch_size_sum"),
  };
}

// Between two readings: requests per second, the bound that 95% kept (ms), searches per batch; null if there were none.
export function since(before, now) {
  const requests = now.requests - before.requests;
  const batches = now.batches - before.batches;
  let p95 = null;
  for (const [bound, count] of [...now.buckets].sort(([one], [other]) => one - other)) {
    if (requests > 0 && p95 === null && count - (before.buckets.get(bound) ?? 0) >= 0.95 * requests) p95 = 1000 * bound;
  }
  return {
    rate: Math.max(0, requests) / ((now.at - before.at) / 1000),
    p95,
    batch: batches > 0 ? (now.searches - before.searches) / batches : null,
  };
}
