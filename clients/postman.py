"""Writes a collection that Postman and Bruno open: every operation, with a body that fits."""

from __future__ import annotations

import json
import re
from typing import Any

from clients.operations import Operation, Schema, fields, name_of, operations

SCHEMA = "https://schema.getpostman.com/json/collection/v2.1.0/collection.json"
VARIABLES = {"address": "http://127.0.0.1:8000", "key": "", "user_id": "u1", "item_id": "i1"}  # the others are empty


def collection(document: Schema) -> str:
    folders: dict[str, list[dict[str, Any]]] = {}
    for each in operations(document):
        folders.setdefault(each.tag, []).append(_request(each, document))
    named = re.findall(r"{{(\w+)}}", json.dumps(folders))
    made = {
        "info": {
            "name": "streamrec",
            "description": "Written by `make clients` from the OpenAPI document. Set the variables address and key.",
            "schema": SCHEMA,
        },
        "variable": [{"key": name, "value": value} for name, value in (dict.fromkeys(named, "") | VARIABLES).items()],
        "auth": {
            "type": "apikey",
            "apikey": [{"key": "key", "value": "X-API-Key"}, {"key": "value", "value": "{{key}}"}],
        },
        "item": [{"name": tag, "item": requests} for tag, requests in folders.items()],
    }
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def _request(operation: Operation, document: Schema) -> dict[str, Any]:
    path = operation.path.replace("{", "{{").replace("}", "}}")
    query = [{"key": name, "value": "", "disabled": True} for name in operation.query]
    request: dict[str, Any] = {
        "method": operation.method,
        "description": operation.description,
        "url": {
            "raw": "{{address}}" + path,
            "host": ["{{address}}"],
            "path": path.strip("/").split("/"),
            "query": query,
        },
    }
    if not operation.is_keyed:
        request["auth"] = {"type": "noauth"}
    if operation.body is not None:
        request["header"] = [{"key": "Content-Type", "value": "application/json"}]
        example = json.dumps(_example("", operation.body, document), indent=1)
        request["body"] = {"mode": "raw", "raw": example, "options": {"raw": {"language": "json"}}}
    return {"name": operation.name.replace("_", " "), "request": request}


def _example(name: str, schema: Schema, document: Schema) -> Any:
    """The least that fits a schema; text is the variable of its name, or of the one that a list's name stands for."""
    if "$ref" in schema:
        return _example(name, document["components"]["schemas"][name_of(schema)], document)
    if "examples" in schema:
        return schema["examples"][0]
    if union := schema.get("anyOf"):
        return _example(name, union[0], document)
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "object":
            return {
                field: _example(field, inside, document)
                for field, inside, is_required, _ in fields(schema)
                if is_required
            }
        case "array":
            return [_example(f"{name.removesuffix('s')}_id", schema["items"], document)]
        case "string":
            return f"{{{{{name}}}}}"
        case "integer" | "number":
            return schema.get("minimum", 1)
        case kind:
            raise ValueError(f"write an example for {name}, of type {kind}, beside its field")
