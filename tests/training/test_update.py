"""The next version of a bundle: old items keep their tokens, new ones get theirs, and what is new is learnt."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serving.bundle import Bundle
from serving.engine import Engine
from serving.items import tokenizer
from serving.online.catalogues import KIND
from serving.online.changelog import CHANGES_FILE, FileLog, RedisLog, stream_key
from serving.online.live_catalogue import LiveCatalogue
from serving.online.redis_link import RedisLink, connect
from tests.builders import tiny_bundle, tiny_model
from tests.conftest import RedisServer
from tests.training.shops import command
from tests.training.small import ITEMS, walks
from tests.waiting import DEADLINE
from training.__main__ import main
from training.data.read import read_items
from training.update import extend, update_config, with_items

FROM_TEXT = (
    "tokenizer.kind=rqvae", "tokenizer.source=text", "tokenizer.rqvae.steps=20", "tokenizer.rqvae.warmup_steps=5",
    "tokenizer.rqvae.latent=8", "tokenizer.rqvae.hidden=16",
)  # fmt: skip
LEARN = ("--set", "sft.steps=120", "sft.lr=2e-2", "sft.eval_every=40", "sft.warmup=4")
STAY = ("--set", "sft.steps=0")


def embed(texts: list[str], name: str, progress: bool = False) -> np.ndarray:
    """In place of a language model: equal texts have equal embeddings."""
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") for text in texts]
    made = np.stack([np.random.default_rng(seed).standard_normal(12) for seed in seeds]).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


@pytest.fixture(scope="module", autouse=True)
def embedder() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "embed_text", embed)
        yield


def write_data(folder: Path, stride: int, items: list[dict[str, Any]]) -> Path:
    """A shop whose users go on `stride` items further every time."""
    folder.mkdir()
    starts = [(user, walk[0], len(walk)) for user, walk in enumerate(walks(stride))]
    rows = [f"u{user},i{(start + stride * at) % ITEMS},{at}" for user, start, length in starts for at in range(length)]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    items = [{"item_id": f"i{row}", "title": f"Thing {row}", "categories": ["old"]} for row in range(ITEMS)]
    data = write_data(folder / "shop", 7, items)
    assert main(command("run", data, folder / "bundle", *FROM_TEXT, "name=shop")) == 0
    return folder / "bundle"


@pytest.fixture(scope="module")
def new_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    items = [
        {"item_id": "n0", "title": "one text", "brand": "B"},
        {"item_id": "n1", "title": "one text", "brand": "B"},
        {"item_id": "bare"},
        {"item_id": "i1"},
        {"item_id": "i2", "title": "Thing two"},
    ]
    data = write_data(tmp_path_factory.mktemp("new") / "shop", 11, items)
    with (data / "interactions.csv").open("a") as file:
        file.write("".join(f"v{user},{item},{at}\n" for user in range(3) for at, item in enumerate(["n0", "bare"])))
    return data


def put(item: str, title: str) -> dict[str, Any]:
    return {"item_id": item, "title": title, "brand": None, "categories": ["live"], "description": None,
            "fields": {}, "available_from": None, "available_until": None}  # fmt: skip


async def change(bundle: Bundle, *logs: Any) -> None:
    """A service puts three items of one text and takes one of them and an old one away."""

    async def at_once(work: Any) -> Any:
        return work()

    live = LiveCatalogue(Engine(bundle), at_once)
    entries = await live.put_entries([put(f"live{n}", "one text. B") for n in range(3)])
    entries += [{"do": "delete", "item_id": "live1"}, {"do": "delete", "item_id": "i3"}]
    entries += [{"do": "name", "name": "few", "items": ["i4", "live2"]}]
    await live.apply(entries)  # type: ignore[arg-type]
    for log in logs:
        await log.append([{"kind": "model", "do": "else"}, *({"kind": KIND, **entry} for entry in entries)])
    await live.close()


def run(earlier: Path, data: Path, out: Path, *more: str) -> int:
    return main(["update", "--bundle", str(earlier), "--data", str(data), "--out", str(out), *more])


@pytest.fixture(scope="module")
def updated(earlier: Path, new_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("updated")
    asyncio.run(change(Bundle.load(earlier), FileLog(folder / "state" / CHANGES_FILE)))
    assert run(earlier, new_data, folder / "next", "--changes", str(folder / "state"), *LEARN) == 0
    return folder / "next"


def test_every_item_keeps_its_row_and_its_tokens_whoever_added_it(earlier: Path, updated: Path) -> None:
    before, after = Bundle.load(earlier).catalogue, Bundle.load(updated).catalogue
    assert after.item_ids[:ITEMS] == before.item_ids
    assert after.item_ids[ITEMS:] == ["live0", "live1", "live2", "n0", "n1"]
    np.testing.assert_array_equal(after.tokens[:ITEMS], before.tokens)
    live = Bundle.load(earlier)
    asyncio.run(change(live))
    np.testing.assert_array_equal(after.tokens[: ITEMS + 3], live.catalogue.tokens)
    assert len(np.unique(after.tokens, axis=0)) == len(after)
    row = {item: after.row(item) for item in after.item_ids}
    assert (after.titles[row["i1"]], after.titles[row["i2"]]) == ("Thing 1", "Thing two")
    assert after.categories[row["i1"]] == ["old"] and after.categories[row["live0"]] == ["live"]
    assert after.fields_of(row["n0"])["brand"] == "B"
    assert [after.item_ids[member] for member in after.subsets["few"]] == ["i4", "live2"]
    assert after.popularity[row["n0"]] == 3 and after.popularity[row["i5"]] > before.popularity[row["i5"]]


def test_what_a_row_leaves_out_of_a_known_item_stays(earlier: Path, tmp_path: Path) -> None:
    lines = [
        {"item_id": "i1", "title": "One", "fields": {"price": 9.5, "sale": True, "brand": "A"}},
        {"item_id": "i1", "fields": {"price": 7.5}},
        {"item_id": "i1", "brand": "B"},
        {"item_id": "i1", "description": "Long"},
        {"item_id": "i1", "categories": ["new"]},
        {"item_id": "i1"},
    ]
    bundle = Bundle.load(earlier)
    tokens, file, found = bundle.catalogue.tokens.copy(), tmp_path / "items.jsonl", []
    for line in lines:
        file.write_text(json.dumps(line))
        bundle = extend(bundle, [], read_items(file)).bundle
        row = bundle.catalogue.row("i1")
        assert row is not None
        found.append((bundle.catalogue.titles[row], bundle.catalogue.categories[row], bundle.catalogue.fields_of(row)))
    np.testing.assert_array_equal(bundle.catalogue.tokens, tokens)
    before, priced = {"price": 9.5, "sale": True, "brand": "A"}, {"price": 7.5, "sale": True, "brand": "A"}
    branded = priced | {"brand": "B"}
    assert found == [
        ("One", ["old"], before), ("One", ["old"], priced), ("One", ["old"], branded), ("One", ["old"], branded),
        ("One", ["new"], branded), ("One", ["new"], branded),
    ]  # fmt: skip


def test_what_is_new_is_learnt_and_stands_beside_the_earlier_version(earlier: Path, updated: Path) -> None:
    version = Bundle.load(earlier).version
    about = Bundle.load(updated).about["update"]
    assert about["of"] == version
    rows = {(row["model"], row["steps"]): row for row in about["measured"]}
    assert set(rows) == {(model, steps) for model in (version, "update") for steps in (0, 2)}
    for steps in (0, 2):
        old, new = rows[version, steps], rows["update", steps]
        assert old["users"] == new["users"] == 20 and (new["of"], new["split"]) == (60, "test")
        assert new["gain"] == pytest.approx(new["ndcg@10"] - old["ndcg@10"], abs=2e-5) and "gain" not in old
        assert (
            new["gain_low"] <= new["gain"] <= new["gain_high"] and new["gain"] > 0.1
        )  # the earlier one goes 7 further, where all go 11 by now
    card = (updated / "README.md").read_text()
    assert f"goes on from {version}" in card and f"| update | 2 | {rows['update', 2]['recall@10']:.4f} |" in card


def test_without_steps_the_weights_stay_and_a_new_item_has_no_free_vector(
    earlier: Path, new_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = Bundle.load(earlier).dense_weight  # or another one could be chosen for the new interactions
    assert run(earlier, new_data, tmp_path / "next", *STAY, f"evaluation.dense_weights=[{weight}]") == 0
    output = capsys.readouterr().out
    assert "3 events of items without a semantic ID (left out)" in output
    assert "1 items left out: A new item needs a text" in output and "new items                          2" in output
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(rows) == 4 and [row["gain"] for row in rows[1::2]] == [0.0, 0.0]
    before, after = Bundle.load(earlier).network.state_dict(), Bundle.load(tmp_path / "next").network.state_dict()
    free = after.pop("heads.item_free.weight")
    assert torch.equal(free[:ITEMS], before.pop("heads.item_free.weight")) and not free[ITEMS:].any()
    assert len(free) == ITEMS + 2 and all(torch.equal(after[name], before[name]) for name in before)
    following = update_config(Bundle.load(tmp_path / "next"), [])  # goes on in the stage that taught these weights
    assert (following.pretrain.steps, following.sft.steps, following.last_supervised) == (0, 300, "sft")


def test_what_the_encoder_reads_of_a_new_item_is_its_tokens_alone() -> None:
    network = tiny_model(4, item_input=True).network
    larger = with_items(network, 6).heads.item_input.weight
    assert torch.equal(larger[:4], network.heads.item_input.weight) and not larger[4:].any()


def test_the_memory_is_fitted_to_the_new_interactions(earlier: Path, new_data: Path, tmp_path: Path) -> None:
    memory = ("neighbours.enabled=true", "neighbours.parts=counted")
    assert run(earlier, new_data, tmp_path / "next", *STAY, *memory) == 0
    bundle = Bundle.load(tmp_path / "next")
    assert bundle.neighbours is not None and len(bundle.neighbours) == ITEMS + 2
    shares, _ = bundle.neighbours.shares([[0], [4]], bundle.max_items)
    assert shares.dense(ITEMS + 2).argmax(1).tolist() == [11, 15]


def test_a_finished_update_is_read_back_and_its_folder_belongs_to_it(
    earlier: Path, updated: Path, new_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in updated.iterdir() if path.is_file()}
    state, weights = updated.with_name("state"), updated.with_name("next.work") / "sft.latest.safetensors"
    trained = weights.stat().st_mtime_ns
    (state / CHANGES_FILE).rename(state / "gone")  # what a service said is kept in the work folder
    assert run(earlier, new_data, updated, "--changes", str(state), *LEARN) == 0
    assert weights.stat().st_mtime_ns == trained
    assert all((updated / name).read_bytes() == before[name] for name in ("catalogue.parquet", "heads.safetensors"))
    assert run(earlier, new_data, updated, "--changes", str(state), *STAY) == 2
    assert run(updated, new_data, updated, "--changes", str(state), *LEARN) == 2
    assert capsys.readouterr().err.count("belongs to a run with other data or settings") == 2


def test_the_changes_are_read_from_redis_too(
    earlier: Path, new_data: Path, tmp_path: Path, redis_server: RedisServer
) -> None:
    async def fill() -> None:
        client = connect(redis_server.url)
        await change(Bundle.load(earlier), RedisLog(RedisLink(client, DEADLINE), stream_key("shop")))
        await client.aclose()

    asyncio.run(fill())
    changes = ("--changes", redis_server.url, "--redis-prefix", "shop")
    assert run(earlier, new_data, tmp_path / "next", *changes, *STAY) == 0
    assert "live2" in Bundle.load(tmp_path / "next").catalogue.item_ids


@pytest.mark.parametrize(
    ("bundle", "more", "words"),
    [
        ("earlier", ["--changes", "nowhere"], "nowhere/changes.jsonl; name the folder"),
        ("earlier", ["--changes", "redis://127.0.0.1:1"], "check the address"),
        ("earlier", ["--changes", "rubbish://secret@x"], "not the address of a Redis"),
        ("earlier", ["--set", "sft.stepz=1"], "did you mean sft.steps"),
        ("untrained", [], "does not say how it was trained"),
    ],
)
def test_one_sentence_says_what_is_wrong(
    earlier: Path, new_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    bundle: str, more: list[str], words: str,
) -> None:  # fmt: skip
    folder = earlier if bundle == "earlier" else tiny_bundle(tmp_path / "untrained")
    assert run(folder, new_data, tmp_path / "next", *more) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert words in sentence and "secret" not in sentence and not (tmp_path / "next").exists()
