// Pictures: the state's trajectory, the stages of a request, and the live curve. They know nothing about requests.

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

// The state among the items: one line per item, as high as the state is similar to it, from before reasoning to the last
// step. items: [{id, name}], best first; similarity: per item, the cosine of item and state after each step.
export function trajectory(width, items, similarity, chosen) {
  const wide = width >= 560;
  const [top, bottom, left, right] = [14, 250, 46, width - (wide ? 240 : 44)];
  const last = similarity[0].length - 1;
  const all = similarity.flat();
  const margin = 0.08 * (Math.max(...all) - Math.min(...all)) || 0.01;
  const [low, high] = [Math.min(...all) - margin, Math.max(...all) + margin];
  const x = (step) => left + ((right - left) * step) / last;
  const y = (value) => bottom - ((bottom - top) * (value - low)) / (high - low);
  const picture = shape("svg", { viewBox: `0 0 ${width} ${bottom + 26}`, width, height: bottom + 26, role: "img", "aria-label": describe(items, similarity) });

  for (const value of ticks(low, high)) {
    picture.append(shape("line", { class: "grid-line", x1: left, y1: y(value), x2: right, y2: y(value) }), text("tick end", left - 10, y(value) + 4, value.toFixed(2)));
  }
  picture.append(shape("line", { class: "chosen-step", x1: x(chosen), y1: top - 6, x2: x(chosen), y2: bottom + 4 }));
  for (let step = 0; step <= last; step++) {
    picture.append(text(step === chosen ? "tick middle chosen" : "tick middle", x(step), bottom + 20, step || (wide ? "before" : "0")));
  }
  const heights = apart(similarity.map((each) => y(each[last])), 17, top, bottom);
  items.map((item, n) => n).reverse().forEach((n) => { // the best is drawn last, on top
    const [item, values] = [items[n], similarity[n]];
    const group = shape("g", { class: values[last] > values[0] ? "line nearer" : "line" });
    group.dataset.item = item.id;
    const title = shape("title", {});
    title.textContent = `${item.name}: ${values.map((value) => value.toFixed(2)).join(" → ")}`;
    group.append(title, shape("path", { class: "trajectory", pathLength: 1, d: `M${values.map((value, step) => `${x(step)} ${y(value)}`).join("L")}` }));
    values.forEach((value, step) => group.append(shape("circle", { cx: x(step), cy: y(value), r: step === chosen ? 4.5 : 3 })));
    group.append(
      shape("path", { class: "lead", d: `M${right + 7} ${y(values[last])}L${right + 18} ${heights[n]}` }),
      text("rank", right + 24, heights[n] + 4, n + 1));
    if (wide) group.append(text("name", right + 42, heights[n] + 4, shorten(item.name, 25)));
    picture.append(group);
  });
  return picture;
}

function text(kind, x, y, words) {
  const made = shape("text", { class: kind, x, y });
  made.textContent = words;
  return made;
}

// Three to six round values between two bounds.
function ticks(low, high) {
  const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5].find((each) => (high - low) / each <= 6) ?? 1;
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, n) => (first + n) * step);
}

// Heights moved as little as possible, so that labels do not overlap.
function apart(heights, gap, top, bottom) {
  const order = heights.map((_, n) => n).sort((one, other) => heights[one] - heights[other]);
  const moved = [...heights];
  order.forEach((n, index) => { if (index) moved[n] = Math.max(moved[n], moved[order[index - 1]] + gap); });
  let limit = bottom;
  for (const n of order.reverse()) {
    moved[n] = Math.max(top, Math.min(moved[n], limit));
    limit = moved[n] - gap;
  }
  return moved;
}

function describe(items, similarity) {
  const last = similarity[0].length - 1;
  const changes = items.slice(0, 3).map((item, n) => `${item.name} from ${similarity[n][0].toFixed(2)} to ${similarity[n][last].toFixed(2)}`);
  return `Similarity of the state to the best items, before reasoning and after ${last} steps: ${changes.join("; ")}.`;
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
