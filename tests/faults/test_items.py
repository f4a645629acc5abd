"""Items of which nothing is known, that are named twice, or for which no code is left: said clearly, and nothing else
suffers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from serving.bundle import Bundle
from serving.items import tokenizer
from tests.app.test_items_change import ADMIN, Serve, embed, everything, folder, serve
from tests.training.shops import command, write_shop
from tests.training.small import ITEMS
from training.__main__ import main
from training.data.read import Items
from training.update import extend

__all__ = ["folder", "serve"]  # fixtures
FROM_TEXT = ("tokenizer.kind=rqvae", "tokenizer.rqvae.steps=10", "tokenizer.rqvae.warmup_steps=2")
UNTRAINED = ("pretrain.steps=1", "sft.steps=0", "rl.steps=0")


def test_a_new_item_without_text_or_code_is_left_out_with_the_reason_by_a_service_and_by_an_update(
    serve: Serve, folder: Path
) -> None:
    client, before = serve(), len(Bundle.load(folder).catalogue)
    items = [{"item_id": "bare"}, *({"item_id": f"twin{n}", "title": "one and the same text"} for n in range(14))]
    answer = client.post("/items", json={"items": [*items, items[1]]}, headers=ADMIN)
    *results, doubled = answer.json()["results"]
    assert doubled["status"] == 422 and "named twice" in doubled["detail"]
    put = {result["item_id"]: result["tokens"] for result in results if "tokens" in result}
    refused = Counter(result["detail"] for result in results if "tokens" not in result)
    assert {result["status"] for result in results if "tokens" not in result} == {409} and len(refused) == 2
    assert set(put) <= set(everything(client)) and not {"bare", "twin13"} & set(everything(client))

    ids, titles = [item["item_id"] for item in items], [item.get("title") for item in items]
    nothing: list[str | None] = [None] * len(ids)
    extended = extend(Bundle.load(folder), [], Items(ids, titles, nothing, [[] for _ in ids], nothing))
    new = extended.bundle.catalogue
    assert dict(zip(new.item_ids[before:], new.tokens[before:].tolist(), strict=True)) == put
    assert extended.left_out == refused and extended.added == len(put)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shop with an item that has neither text nor events."""
    monkeypatch.setattr(tokenizer, "embed_text", embed)
    made = write_shop(tmp_path / "shop")
    items = [{"item_id": f"i{row}", "title": f"Thing {row}"} for row in range(ITEMS)] + [{"item_id": "bare"}]
    (made / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return made


def test_an_item_without_text_and_events_is_trained_with_like_any_other(data: Path, tmp_path: Path) -> None:
    assert main(command("run", data, tmp_path / "b", *FROM_TEXT, *UNTRAINED)) == 0
    catalogue = Bundle.load(tmp_path / "b").catalogue
    row = catalogue.row("bare")
    assert row is not None and catalogue.popularity[row] == 0
    assert len(np.unique(catalogue.tokens, axis=0)) == len(catalogue) == ITEMS + 1


def test_an_id_that_is_in_the_data_twice_ends_a_run_before_it_begins(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (data / "items.jsonl").open("a") as file:
        file.write('{"item_id": "i3", "title": "again"}\n')
    assert main(command("run", data, tmp_path / "b", *FROM_TEXT)) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert f"row {ITEMS + 2}: item_id 'i3' is already in row 4" in sentence
    assert not (tmp_path / "b").exists()
