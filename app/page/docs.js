// The API, drawn from /openapi.json: every route with what it takes and gives, and a form to try it.

const $ = (id) => document.getElementById(id);

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children.filter((child) => child !== null));
  return made;
}

let document_;  // the OpenAPI document

function resolve(schema) {
  while (schema?.$ref) schema = schema.$ref.slice(2).split("/").reduce((at, key) => at[key], document_);
  return schema ?? {};
}

// A type as people write it: string, integer or null, array of Item.
function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.type === "array") return `array of ${typeOf(schema.items ?? {})}`;
  return schema.type ?? "any";
}

function bounds(schema) {
  const parts = [schema, ...(schema.anyOf ?? [])];
  const told = { minimum: "≥", exclusiveMinimum: ">", maximum: "≤", maxLength: "length ≤", minLength: "length ≥", maxItems: "items ≤", minItems: "items ≥" };
  const found = parts.flatMap((part) => Object.keys(told).filter((key) => key in part).map((key) => `${told[key]} ${part[key]}`));
  if (schema.default !== undefined) found.push(`default ${JSON.stringify(schema.default)}`);
  return found.join(", ");
}

function fields(rows) {
  return element("dl", "fields", ...rows.flatMap(([name, schema, required, description]) => [
    element("dt", "", element("code", "", name), required ? element("span", "muted", " required") : null),
    element("dd", "", element("span", "type", typeOf(schema)), " ",
      element("span", "muted", [bounds(schema), description ?? schema.description].filter(Boolean).join(" · "))),
  ]));
}

function properties(schema) {
  const made = resolve(schema);
  return Object.entries(made.properties ?? {}).map(([name, each]) => [name, each, made.required?.includes(name)]);
}

// A body to start from: what is required, and a history where there is one.
function example(schema) {
  const made = resolve(schema);
  if (made.properties?.history) return { history: [], k: 5 };
  if (made.properties?.requests) return { requests: [{ history: [], k: 5 }] };
  return Object.fromEntries((made.required ?? []).map((name) => [name, []]));
}

function route(path, method, operation) {
  const parameters = operation.parameters ?? [];
  const body = operation.requestBody?.content["application/json"]?.schema;
  const name = `${method.toUpperCase()} ${path}`;
  const section = element("section", "panel route");
  section.id = operation.operationId;
  section.append(
    element("h2", "", element("span", `method ${method}`, method.toUpperCase()), element("code", "", path)),
    element("p", "", operation.description ?? operation.summary));
  if (parameters.length) {
    section.append(element("h3", "", "Parameters"), fields(parameters.map((each) => [each.name, each.schema, each.required, each.description])));
  }
  if (body) section.append(element("h3", "", "Body"), fields(properties(body)));
  const answers = Object.entries(operation.responses).map(([status, response]) => {
    const schema = Object.values(response.content ?? {})[0]?.schema;
    const rows = Number(status) < 400 && schema ? properties(schema) : [];
    const line = [element("code", "", status), ` ${response.description}`];
    if (!rows.length) return element("p", "answer-line", ...line);
    return element("details", "answer-line", element("summary", "", ...line), fields(rows));
  });
  section.append(element("h3", "", "Answers"), ...answers, attempt(path, method, parameters, body, name));
  return section;
}

function attempt(path, method, parameters, body, name) {
  const form = element("form", "try");
  const inputs = parameters.map((each) => {
    const input = element("input");
    input.required = Boolean(each.required);
    form.append(element("label", "field", each.name, input));
    return [each, input];
  });
  let text = null;
  if (body) {
    text = element("textarea");
    text.rows = 4;
    text.spellcheck = false;
    text.value = JSON.stringify(example(body), null, 2);
    form.append(element("label", "field wide", "Body", text));
  }
  const send = element("button", "primary", "Send");
  send.setAttribute("aria-label", `Send ${name}`);
  const shown = element("pre");
  shown.hidden = true;
  shown.setAttribute("aria-live", "polite");
  form.append(send, shown);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const query = new URLSearchParams();
    let target = path;
    for (const [each, input] of inputs) {
      if (each.in === "path") target = target.replace(`{${each.name}}`, encodeURIComponent(input.value));
      else if (input.value) query.set(each.name, input.value);
    }
    const headers = { ...(text && { "Content-Type": "application/json" }), ...($("key").value && { "X-API-Key": $("key").value }) };
    shown.hidden = false;
    try {
      const response = await fetch(query.size ? `${target}?${query}` : target, { method: method.toUpperCase(), headers, body: text?.value });
      const told = await response.text();
      shown.textContent = `${response.status} ${response.statusText}\n${pretty(told)}`;
    } catch {
      shown.textContent = "The service cannot be reached.";
    }
  });
  return element("details", "", element("summary", "", "Try it"), form);
}

function pretty(text) {
  try { return JSON.stringify(JSON.parse(text), null, 2); } catch { return text; }
}

async function start() {
  try {
    document_ = await (await fetch("/openapi.json")).json();
  } catch {
    $("routes").replaceChildren(element("p", "notice bad", "The description could not be read; reload the page."));
    return;
  }
  const all = Object.entries(document_.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => [path, method, operation]));
  $("contents").replaceChildren(...all.map(([path, method, operation]) => {
    const link = element("a", "", element("span", `method ${method}`, method.toUpperCase()), path);
    link.href = `#${operation.operationId}`;
    return link;
  }));
  $("routes").replaceChildren(...all.map((each) => route(...each)));
  if (location.hash) $(location.hash.slice(1))?.scrollIntoView();
}

start();
