"""What diverse lists cost: rows from end to end with a tiny model, and what is said of lists by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.accuracy.diversity import PLAIN, SETTINGS, main, of_lists
from serving.bundle import Bundle
from serving.bundle_writer import write_bundle
from tests.benchmarks.accuracy.test_cold import dataset
from tests.builders import tiny_model


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return tiny_model()


def test_what_lists_hold_is_counted(bundle: Bundle) -> None:
    data = dataset([[0, 1]], [[0, 1]], len(bundle.catalogue))
    bundle.catalogue.categories[:4] = [["a"], ["a", "b"], [], ["c"]]
    found = of_lists(bundle, data, np.array([[0, 1, 3], [1, 0, -1], [2, -1, -1]]))
    first, second = bundle.unit_vectors([0, 1, 3]).astype(float), bundle.unit_vectors([0, 1]).astype(float)
    pairs = [first[0] @ first[1], first[0] @ first[2], first[1] @ first[2]]
    expected = (np.mean(pairs) + second[0] @ second[1]) / 2
    assert found["length"] == 2.0 and found["categories"] == pytest.approx((3 + 2 + 0) / 3, abs=1e-4)
    assert found["coverage"] == pytest.approx(4 / len(bundle.catalogue), abs=1e-4)
    assert found["similarity"] == pytest.approx(expected, abs=2e-4)


def test_a_row_for_every_setting(bundle: Bundle, tmp_path: Path) -> None:
    items = len(bundle.catalogue)
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    lines = [f"u{user},{bundle.catalogue.item_ids[row]},{at}"
             for user in range(20) for at, row in enumerate(rng.choice(items, 4, replace=False))]  # fmt: skip
    (folder / "items.jsonl").write_text("".join(f'{{"item_id": "{name}"}}\n' for name in bundle.catalogue.item_ids))
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines]))
    write_bundle(tmp_path / "bundle", bundle, model_card="", write_tokenizer=lambda _: None)
    main(["--bundle", str(tmp_path / "bundle"), "--data", str(folder), "--out", str(tmp_path / "out.json")])
    rows = {row["model"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert list(rows) == list(SETTINGS) and "gain" not in rows[PLAIN]
    assert all(row["users"] == 20 and row["against"] == PLAIN for name, row in rows.items() if name != PLAIN)
    assert rows["diversity 0.8"]["similarity"] < rows[PLAIN]["similarity"]
    assert rows["at most 1 per category"]["length"] <= rows["at most 5 per category"]["length"] <= 10
