"""Writes the Python client's types and methods: `streamrec/models.py` and `streamrec/operations.py`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from textwrap import fill

from clients.operations import PYTHON, Operation, Schema, fields, name_of, objects, operations

HEAD = '''"""{about}

Written by `make clients` from the OpenAPI document; do not edit."""

from __future__ import annotations
'''


def models(document: Schema) -> str:
    lines = [HEAD.format(about="What the service takes and answers, as types of dictionaries.")]
    lines += ["from typing import Any, Literal, NotRequired, TypedDict"]
    for name, schema in objects(document).items():
        lines += ["", "", f"class {name}(TypedDict):"]
        if about := schema.get("description"):
            lines += [_docstring(about, "    "), ""]
        for field, inside, is_required, description in fields(schema):
            kind = PYTHON.type_of(inside)
            lines.append(f"    {field}: {kind if is_required else f'NotRequired[{kind}]'}")
            if description:
                lines.append(_docstring(description, "    "))
    return _formatted(lines)


def methods(document: Schema) -> str:
    known = operations(document)
    used = sorted({name for name in objects(document) for each in known if name in _types(each)})
    lines = [
        HEAD.format(about="A method for each operation of the service, for both kinds of client."),
        "from typing import Any, Literal, Unpack",
        "",
        f"from streamrec.models import {', '.join(used)}",
        "from streamrec.transport import AsyncTransport, Transport, segment",
    ]
    for kind, define, wait in (("", "def", ""), ("Async", "async def", "await ")):
        lines += ["", "", f"class {kind}Operations({kind}Transport):"]
        lines += [f'    """What the service can be asked{", awaited" if kind else ""}."""']
        for each in known:
            lines += ["", *_method(each, define, wait)]
    return _formatted(lines)


def _method(operation: Operation, define: str, wait: str) -> Iterable[str]:
    answer = PYTHON.type_of(operation.answer) if operation.answer is not None else "None"
    parameters = ["self", *(f"{name}: str" for name in operation.path_parameters), "/"]
    path, call = operation.path, []
    for name in operation.path_parameters:
        path = path.replace(f"{{{name}}}", f"{{segment({name})}}")
    if operation.body is not None and "$ref" not in operation.body:  # one of several: no keywords can stand for it
        parameters.insert(-1, f"body: {PYTHON.type_of(operation.body)}")
    if operation.query:
        parameters += ["*", *(f"{name}: {_optional(schema)} = None" for name, schema in operation.query.items())]
        call.append("query={" + ", ".join(f'"{name}": {name}' for name in operation.query) + "}")
    if operation.body is not None:
        if "$ref" in operation.body:
            parameters.append(f"**body: Unpack[{name_of(operation.body)}]")
        call.append("body=body")
    if operation.is_repeatable:
        call.append("is_repeatable=True")
    literal = f'f"{path}"' if operation.path_parameters else f'"{path}"'
    yield f"    {define} {operation.name}({', '.join(parameters)}) -> {answer}:"
    yield _docstring(operation.description, "        ")
    arguments = ", ".join([f'"{operation.method}"', literal, *call])
    called = f"{wait}self._call({arguments})"
    if operation.answer is None:
        yield f"        {called}"
    else:
        yield f"        answer: {answer} = {called}"
        yield "        return answer"


def _optional(schema: Schema) -> str:
    kind = PYTHON.type_of(schema)
    return kind if "None" in kind.split(" | ") else f"{kind} | None"


def _types(operation: Operation) -> set[str]:
    schemas = [schema for schema in (operation.body, operation.answer) if schema is not None]
    return {name for schema in schemas for name in PYTHON.type_of(schema).split(" | ")}


def _docstring(text: str, indent: str) -> str:
    return fill(f'"""{text}"""', 120, initial_indent=indent, subsequent_indent=indent)


def _formatted(lines: Iterable[str]) -> str:
    """As ruff has it, unused imports left out."""
    text = "\n".join(lines) + "\n"
    for options in (["check", "--quiet", "--fix", "--select", "F401,I"], ["format", "--quiet"]):
        command = [sys.executable, "-m", "ruff", *options, "--stdin-filename", "streamrec/models.py", "-"]
        text = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    return text
