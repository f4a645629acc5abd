"""What the OpenAPI document says, for the writers of clients: operations, schemas, and types in two languages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Schema = dict[str, Any]

# Sent twice they do no more than once, so a client may repeat them when it cannot know what became of the first.
REPEATABLE_TAGS = {"recommend", "feedback"}
REPEATABLE_METHODS = {"GET", "PUT", "DELETE"}


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. body, answer: their schemas, None where there is none."""

    name: str
    method: str
    path: str
    tag: str
    description: str
    path_parameters: list[str]
    query: dict[str, Schema]
    body: Schema | None
    answer: Schema | None
    is_keyed: bool

    @property
    def is_repeatable(self) -> bool:
        return self.method in REPEATABLE_METHODS or self.tag in REPEATABLE_TAGS


def operations(document: Schema) -> list[Operation]:
    """Those that answer with JSON or nothing, in the document's order."""
    found = []
    for path, methods in document["paths"].items():
        for method, each in methods.items():
            success = next(answer for status, answer in each["responses"].items() if status.startswith("2"))
            is_empty = "204" in each["responses"]
            answer = success.get("content", {}).get("application/json")
            if answer is None and not is_empty:
                continue  # text, for Prometheus
            body = each.get("requestBody", {}).get("content", {}).get("application/json")
            parameters = each.get("parameters", [])
            found.append(
                Operation(
                    name=each["operationId"],
                    method=method.upper(),
                    path=path,
                    tag=each["tags"][0],
                    description=" ".join(each.get("description", each["summary"]).split()),
                    path_parameters=re.findall(r"{(\w+)}", path),
                    query={one["name"]: one["schema"] for one in parameters if one["in"] == "query"},
                    body=body and body["schema"],
                    answer=answer and answer["schema"],
                    is_keyed="security" in each,
                )
            )
    return found


def objects(document: Schema) -> dict[str, Schema]:
    """The named schemas, by name."""
    found: dict[str, Schema] = document["components"]["schemas"]
    return dict(sorted(found.items()))


def fields(schema: Schema) -> Iterator[tuple[str, Schema, bool, str]]:
    """Name, schema, whether it is required, and description of each field of an object."""
    required = schema.get("required", [])
    for name, field in schema.get("properties", {}).items():
        yield name, field, name in required, field.get("description", "")


def name_of(reference: Schema) -> str:
    return str(reference["$ref"].rpartition("/")[2])


@dataclass(frozen=True, slots=True)
class Language:
    """How a language writes types. names: of JSON's; the others have a place for the type inside."""

    names: dict[str, str]
    anything: str
    array: str
    map: str
    literal: str

    def type_of(self, schema: Schema) -> str:
        if "$ref" in schema:
            return name_of(schema)
        if union := schema.get("anyOf", schema.get("oneOf")):
            return self._union(union)
        if "const" in schema or "enum" in schema:
            values = schema.get("enum", [schema.get("const")])
            return " | ".join(self.literal.format(json.dumps(value)) for value in values)
        kind = schema.get("type")
        if kind == "array":
            return self.array.format(self.type_of(schema.get("items", {})))
        if kind == "object":
            inside = schema.get("additionalProperties", {})
            return self.map.format(self.type_of(inside) if isinstance(inside, dict) else self.anything)
        return self.names.get(kind or "", self.anything)

    def _union(self, schemas: list[Schema]) -> str:
        return " | ".join(dict.fromkeys(self.type_of(schema) for schema in schemas))


PYTHON = Language(
    names={"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"},
    anything="Any",
    array="list[{}]",
    map="dict[str, {}]",
    literal="Literal[{}]",
)
TYPESCRIPT = Language(
    names={"string": "string", "integer": "number", "number": "number", "boolean": "boolean", "null": "null"},
    anything="unknown",
    array="Array<{}>",
    map="Record<string, {}>",
    literal="{}",
)
