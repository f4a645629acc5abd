"""The JSON Schemas in docs/schemas say what the code reads and writes."""

from __future__ import annotations

import copy
import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from serving.manifest import CHOICES, READABLE, REQUIRED_FILES, settings_from_json, settings_to_json
from tests.builders import GATE, tiny_model
from training.data.errors import DataError
from training.data.interactions import OPTIONAL, WANTED
from training.data.read import read_items
from training.data.shop import write_shop

ROOT = Path(__file__).parents[2]


def schema(name: str) -> Draft202012Validator:
    found = json.loads((ROOT / f"docs/schemas/{name}.schema.json").read_text())
    Draft202012Validator.check_schema(found)
    return Draft202012Validator(found)


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return json.loads((ROOT / "bundles/demo/bundle.json").read_text())


def test_manifests_fit(manifest: dict[str, Any]) -> None:
    bundle = schema("bundle")
    bundle.validate(manifest)
    mixed = tiny_model(neighbours=True, gate=GATE, attention="causal-by-item", age_bias=True)
    written = json.loads(json.dumps(settings_to_json(mixed.vocabulary, mixed.settings, mixed.neighbours)))
    bundle.validate(manifest | written)
    assert bundle.schema["properties"]["format"]["enum"] == [number for number in READABLE if number > 1]
    sections = {name: part for name, part in written.items() if isinstance(part, dict)}
    for name, part in sections.items():
        assert part.keys() == bundle.schema["properties"][name]["properties"].keys()


def test_what_a_manifest_must_have_is_what_opening_it_needs(manifest: dict[str, Any]) -> None:
    bundle = schema("bundle")
    properties = bundle.schema["properties"]
    assert {*properties["files"]["required"]} == REQUIRED_FILES
    for section in ("history", "reasoning", "score", "encoder"):
        for name in manifest[section]:
            cut = copy.deepcopy(manifest)
            del cut[section][name]
            if name not in properties[section]["required"]:
                bundle.validate(cut)
                settings_from_json(cut)
            else:
                assert not bundle.is_valid(cut), name
        for name, values in CHOICES.items():
            if name in properties[section]["properties"]:
                assert tuple(properties[section]["properties"][name]["enum"]) == values
    assert not bundle.is_valid(manifest | {"files": {"catalogue.parquet": "0" * 64}})


ITEMS: list[tuple[dict[str, Any], bool]] = [
    ({"item_id": "a"}, True),
    ({"item_id": 7, "title": None, "brand": "Lux", "categories": ["Toys", ["Wooden"]], "more": 1}, True),
    ({"item_id": "a", "title": ["Two", "texts"], "fields": {"price": 9.5, "sizes": ["M"], "new": True}}, True),
    ({"title": "no id"}, False),
    ({"item_id": ""}, False),
    ({"item_id": "a" * 257}, False),
    ({"item_id": True}, False),
    ({"item_id": "a", "title": {"en": "x"}}, False),
    ({"item_id": "a", "fields": ["price"]}, False),
    ({"item_id": "a", "fields": {"size": {"width": 1}}}, False),
    ({"item_id": "a", "fields": {"sizes": [1]}}, False),
]


def test_an_item_fits_where_it_can_be_read(tmp_path: Path) -> None:
    items, path = schema("items"), tmp_path / "items.jsonl"
    for item, is_good in ITEMS:
        path.write_text(json.dumps(item) + "\n")
        assert items.is_valid(item) == is_good, item
        if is_good:
            assert len(read_items(path)) == 1
        else:
            with pytest.raises(DataError):
                read_items(path)


def test_a_generated_shop_fits(tmp_path: Path) -> None:
    write_shop(tmp_path / "shop", users=30, items=40, seed=0)
    items = schema("items")
    for line in (tmp_path / "shop/items.jsonl").read_text().splitlines():
        items.validate(json.loads(line))
    events = schema("interactions")
    assert {*events.schema["properties"]} == {name for names in WANTED for name in names} | {*OPTIONAL}
    with gzip.open(tmp_path / "shop/interactions.csv.gz", "rt") as file:
        row = next(csv.DictReader(file))
    events.validate(row)
    for name in ("user_id", "item_id", "timestamp"):
        assert not events.is_valid({key: value for key, value in row.items() if key != name})
