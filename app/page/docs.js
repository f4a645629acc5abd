// Swagger UI over this service's own description. The validator is off: it would send the description to another host.

const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", follow);
follow();

const base = new URL(".", location).pathname; // "/", unless a proxy publishes the service below a path
fetch("openapi.json").then((answer) => answer.json()).then((spec) => SwaggerUIBundle({
  spec: base === "/" ? spec : { ...spec, servers: [{ url: base }] },
  dom_id: "#swagger-ui",
  deepLinking: true,
  displayRequestDuration: true,
  defaultModelsExpandDepth: 0,
  validatorUrl: null,
}));
