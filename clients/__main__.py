"""`python -m clients`: writes the clients and the collection from the OpenAPI document of this code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from app.main import create_app
from app.settings import Settings
from clients import postman, python, typescript
from clients.operations import Schema

ROOT = Path(__file__).parents[1]
WRITTEN: dict[str, Callable[[Schema], str]] = {
    "streamrec/models.py": python.models,
    "streamrec/operations.py": python.methods,
    "clients/typescript/index.js": typescript.code,
    "clients/typescript/index.d.ts": typescript.types,
    "clients/streamrec.postman_collection.json": postman.collection,
}


def document() -> Schema:
    """The OpenAPI document, whatever the settings: they change no route."""
    return create_app(Settings.model_construct()).openapi()


def main() -> None:
    described = document()
    for name, write in WRITTEN.items():
        (ROOT / name).write_text(write(described), encoding="utf-8")


if __name__ == "__main__":
    main()
