"""Writes the client for TypeScript and JavaScript: `clients/typescript/index.js`, and its types beside it."""

from __future__ import annotations

from collections.abc import Iterator

from clients.operations import TYPESCRIPT, Operation, Schema, fields, objects, operations

HEAD = "// Written by `make clients` from the OpenAPI document; do not edit."


def code(document: Schema) -> str:
    lines = [
        HEAD,
        'import { Transport, segment } from "./transport.js";',
        "",
        'export { NotFound, ServiceError, Unavailable } from "./transport.js";',
        "",
        "export class Client extends Transport {",
    ]
    for each in operations(document):
        path = each.path
        for name in each.path_parameters:
            path = path.replace(f"{{{name}}}", f"${{segment({name})}}")
        literal = f"`{path}`" if each.path_parameters else f'"{path}"'
        what = ["body"] * (each.body is not None) + ["query"] * bool(each.query)
        what += [f"isRepeatable: {str(each.is_repeatable).lower()}", "...options"]
        names = [name.removesuffix("?") for name, _ in _parameters(each)]
        lines.append(f"  {_camel(each.name)}({', '.join(names)}) {{")
        lines.append(f'    return this.call("{each.method}", {literal}, {{ {", ".join(what)} }});')
        lines += ["  }", ""]
    return "\n".join([*lines[:-1], "}"]) + "\n"


def types(document: Schema) -> str:
    lines = [
        HEAD,
        'import { Options, Transport } from "./transport.js";',
        "",
        'export { NotFound, Options, ServiceError, Settings, Unavailable } from "./transport.js";',
    ]
    for name, schema in objects(document).items():
        lines += ["", *_comment(schema.get("description", ""), ""), f"export interface {name} {{"]
        for field, inside, is_required, description in fields(schema):
            lines += _comment(description, "  ")
            lines.append(f"  {field}{'' if is_required else '?'}: {TYPESCRIPT.type_of(inside)};")
        lines.append("}")
    lines += ["", "export class Client extends Transport {"]
    for each in operations(document):
        answer = "void" if each.answer is None else TYPESCRIPT.type_of(each.answer)
        parameters = ", ".join(f"{name}: {kind}" for name, kind in _parameters(each))
        lines += _comment(each.description, "  ")
        lines.append(f"  {_camel(each.name)}({parameters}): Promise<{answer}>;")
    return "\n".join([*lines, "}"]) + "\n"


def _parameters(operation: Operation) -> Iterator[tuple[str, str]]:
    """Names and types: ids of the path, the body, the query, and what the call itself may be told."""
    yield from ((name, "string") for name in operation.path_parameters)
    if operation.body is not None:
        yield "body", TYPESCRIPT.type_of(operation.body)
    if operation.query:
        inside = "; ".join(f"{name}?: {TYPESCRIPT.type_of(schema)}" for name, schema in operation.query.items())
        yield "query?", f"{{ {inside} }}"
    yield "options?", "Options"


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}/** {' '.join(text.split())} */"] if text else []


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))
