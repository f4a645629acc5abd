// Pictures: the way of the state, the stages of a request, and the live curve. They know nothing of requests.

const SVG = "http://www.w3.org/2000/svg";
export const STAGES = ["queue", "cache", "encode", "reason", "decode"];

export function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children.filter((child) => child !== null));
  return made;
}

function shape(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const shorten = (text, length) => (text.length > length ? `${text.slice(0, length - 1).trimEnd()}…` : text);

// The state among the items. similarity: per item, the cosine of state and item after each step.
// Every item pulls the state with a weight that grows with its similarity; the state lies where the pulls balance.
export function way(width, items, similarity, chosen) {
  const wide = width >= 560;
  const height = wide ? 340 : Math.min(width, 340);
  const [x, y] = [width / 2, height / 2];
  const [across, down] = wide ? [Math.min(width / 2 - 190, 220), height / 2 - 42] : [x - 28, y - 28];
  const places = items.map((_, n) => {
    const angle = (2 * Math.PI * n) / items.length - Math.PI / 2;
    return [x + across * Math.cos(angle), y + down * Math.sin(angle)];
  });
  const all = similarity.flat();
  const middle = all.reduce((sum, value) => sum + value, 0) / all.length;
  const spread = Math.sqrt(all.reduce((sum, value) => sum + (value - middle) ** 2, 0) / all.length) || 1;
  const steps = similarity[0].length;
  const pulls = Array.from({ length: steps }, (_, step) => {
    const weights = similarity.map((each) => Math.exp((1.6 * (each[step] - middle)) / spread));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    return weights.map((weight) => weight / sum);
  });
  const states = pulls.map((weights) => [0, 1].map((axis) => weights.reduce((sum, weight, n) => sum + weight * places[n][axis], 0)));

  const picture = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": describe(items, similarity) });
  picture.append(shape("ellipse", { class: "ring", cx: x, cy: y, rx: across, ry: down }));
  const strongest = Math.max(...pulls[chosen]);
  pulls[chosen].forEach((weight, n) => {
    const line = shape("line", { class: "pull", x1: states[chosen][0], y1: states[chosen][1], x2: places[n][0], y2: places[n][1] });
    line.style.opacity = (0.75 * weight) / strongest;
    picture.append(line);
  });
  picture.append(shape("path", { class: "way", pathLength: 1, d: smooth(states) }));
  states.forEach(([sx, sy], step) => picture.append(
    shape("circle", { class: step === chosen ? "state chosen" : "state", cx: sx, cy: sy, r: step === chosen ? 9 : 5 })));
  const [cx, cy] = states[chosen];
  const number = shape("text", { class: "state-number", x: cx, y: cy + 3.5 });
  number.textContent = chosen;
  picture.append(number);
  places.forEach(([px, py], n) => {
    const size = 9 + (5 * pulls[chosen][n]) / strongest;
    const rank = shape("text", { class: "rank", x: px, y: py + 3.5 });
    rank.textContent = n + 1;
    const title = shape("title", {});
    title.textContent = `${items[n]}: similarity ${similarity[n][chosen].toFixed(2)}`;
    picture.append(shape("g", { class: "item" }, title, shape("circle", { cx: px, cy: py, r: size }), rank));
    if (!wide) return;
    const side = Math.abs(px - x) < 12 ? 0 : Math.sign(px - x);
    const label = shape("text", {
      class: "label", x: px + side * (size + 8), y: py + (side ? 4 : Math.sign(py - y) * (size + 12) + 4),
      "text-anchor": ["end", "middle", "start"][side + 1],
    });
    label.textContent = shorten(items[n], 24);
    picture.append(label);
  });
  return picture;
}

// A curve through all points (Catmull-Rom as Bézier).
function smooth(points) {
  const at = (n) => points[Math.max(0, Math.min(points.length - 1, n))];
  let path = `M${points[0].join(" ")}`;
  for (let n = 0; n + 1 < points.length; n++) {
    const [before, from, to, after] = [at(n - 1), at(n), at(n + 1), at(n + 2)];
    const first = from.map((value, axis) => value + (to[axis] - before[axis]) / 6);
    const second = to.map((value, axis) => value - (after[axis] - from[axis]) / 6);
    path += `C${first.join(" ")} ${second.join(" ")} ${to.join(" ")}`;
  }
  return path;
}

function describe(items, similarity) {
  const last = similarity[0].length - 1;
  const told = items.slice(0, 3).map((item, n) => `${item} from ${similarity[n][0].toFixed(2)} to ${similarity[n][last].toFixed(2)}`);
  return `Similarity of the state to the best items, before thinking and after ${last} steps: ${told.join("; ")}.`;
}

// One bar per answer, on a common scale. timings: [[name, {queue: ms, …, total: ms}], …]
export function bars(timings) {
  const longest = Math.max(...timings.map(([, each]) => each.total), 0.001);
  return timings.map(([name, each]) => {
    const known = STAGES.reduce((sum, stage) => sum + each[stage], 0);
    const parts = [...STAGES.map((stage) => [stage, each[stage]]), ["other", Math.max(0, each.total - known)]];
    const bar = element("div", "bar", ...parts.map(([stage, ms]) => {
      const part = element("i", stage);
      part.style.width = `${(100 * ms) / longest}%`;
      return part;
    }));
    bar.setAttribute("aria-hidden", "true");
    const legend = element("ul", "legend", ...parts.filter(([, ms]) => ms >= 0.05).map(([stage, ms]) =>
      element("li", "", element("i", stage), `${stage} `, element("b", "", ms.toFixed(1)))));
    return element("div", "timing", element("div", "row", element("h3", "", name), element("span", "number", `${each.total.toFixed(1)} ms`)), bar, legend);
  });
}

// The last values as a filled curve, newest on the right.
export function spark(values, length) {
  const [width, height] = [300, 56];
  const top = Math.max(...values, 1);
  const points = values.map((value, n) => [width - ((values.length - 1 - n) * width) / (length - 1), height - 3 - ((height - 8) * value) / top]);
  const picture = shape("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": `Requests per second, now ${values.at(-1).toFixed(1)}` });
  if (points.length > 1) {
    const line = points.map((point) => point.map((value) => value.toFixed(1)).join(" ")).join("L");
    picture.append(
      shape("path", { class: "area", d: `M${line}L${width} ${height}L${points[0][0].toFixed(1)} ${height}Z` }),
      shape("path", { class: "curve", d: `M${line}` }));
  }
  return picture;
}
