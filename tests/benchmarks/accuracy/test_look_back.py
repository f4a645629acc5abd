"""Looking back: what its steps fetch, what is trained of it, and the table."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.accuracy import small_modules
from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.compare_back import LONGER, RECENT
from benchmarks.accuracy.look_back import OLDER, Kind, LookBack, older_items
from benchmarks.accuracy.train_back import ARMS, LOOK
from training.data.shop import write_shop

WIDTH = 4
SMALL = """
    tokenizer.kind=random tokenizer.rqvae.codes=8 tokenizer.source=collaborative pretrain.similar_weight=0
    model.d_model=16 model.d_kv=8 model.d_ff=16 model.layers=1 model.heads=2 model.max_steps=2 model.max_items=4
    pretrain.steps=6 pretrain.eval_every=2 pretrain.warmup=0 pretrain.lr=1e-2 sft.steps=0 rl.steps=0
    evaluation.valid_users=5 evaluation.steps=[0]
""".split()


def look_with(kind: Kind) -> LookBack:
    torch.manual_seed(0)
    return LookBack(torch.eye(WIDTH), kind)


def test_older_items_are_those_before_the_newest_and_begin_with_the_latest():
    older = older_items([np.arange(10, 17), np.arange(3), np.arange(OLDER + 10)], newest=3)
    assert older[0, :5].tolist() == [13, 12, 11, 10, -1]
    assert older[1].tolist() == [-1] * OLDER
    assert older[2, [0, -1]].tolist() == [OLDER + 6, 7]


def test_every_step_begins_as_the_network():
    state, older = torch.randn(2, WIDTH), torch.tensor([[0, 1, 2], [3, -1, -1]])
    for arm in ARMS.values():
        assert torch.equal(look_with(arm.kind)(state, older, 2), torch.stack([state, state]))


def test_a_step_reads_what_the_state_points_at_and_never_the_same_again():
    look = look_with(Kind(fetched=1))
    with torch.no_grad():
        look.direct.fill_(1.0)
    states = look(torch.tensor([[0.0, 4.0, 2.0, 1.0]]), torch.tensor([[3, 2, 1, -1]]), 4)
    expected = [[0, 5, 2, 1], [0, 5, 3, 1], [0, 5, 3, 2], [0, 5, 3, 2]]
    assert states[:, 0].tolist() == expected  # the last finds nothing unread


def test_what_a_step_fetches_is_weighed_by_the_state():
    weights, fetched = look_with(Kind(fetched=2)).fetch(
        torch.tensor([[0.0, 4.0, 2.0, 1.0]]), torch.eye(WIDTH)[None], torch.tensor([[True, True, True, False]])
    )
    assert fetched.tolist() == [[False, True, True, False]]
    torch.testing.assert_close(weights[0, 1:3], torch.tensor([2.0, 1.0]).softmax(0))


def test_without_queries_the_newest_come_first_and_weigh_the_same():
    unread = torch.tensor([[False, True, True, True]])
    weights, _ = look_with(Kind(queries=False, fetched=2)).fetch(torch.randn(1, WIDTH), torch.eye(WIDTH)[None], unread)
    assert weights.tolist() == [[0, 0.5, 0.5, 0]]


def test_the_gradient_reaches_the_query_although_a_user_has_nothing_older():
    look = look_with(Kind(fetched=2))
    with torch.no_grad():
        look.direct.fill_(1.0)
    states = look(torch.randn(2, WIDTH), torch.tensor([[0, 1, 2], [-1, -1, -1]]), 2)
    (states * torch.arange(WIDTH)).sum().backward()
    gradient = look.query.weight.grad
    assert torch.isfinite(gradient).all()
    assert float(gradient.norm()) > 0


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("back")
    write_shop(folder / "shop", users=60, items=40, seed=0)

    def ask() -> dict:
        out = folder / "result.json"
        arguments = ["back", "--data", str(folder / "shop"), "--work", str(folder / "work"), "--out", str(out)]
        assert main([*arguments, "--set", *SMALL]) == 0
        return json.loads(out.read_text())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_modules, "EPOCHS", 1)
        yield folder, ask


def test_every_arm_that_acts_has_its_rows_and_a_second_call_trains_nothing(asked):
    folder, ask = asked
    result = ask()
    checks = {(row["model"], row["excluded"]): row["acts"] for row in result["checks"]}
    assert set(checks) == {(name, excluded) for excluded in (False, True) for name in ARMS}
    for excluded in (False, True):
        acting = {name for name in ARMS if checks[name, excluded]}
        for memory in (False, True):
            rows = [row for row in result["rows"] if row["excluded"] == excluded and row["memory"] == memory]
            assert {row["model"] for row in rows} == {RECENT, LONGER} | acting
            (recent,) = [row for row in rows if row["model"] == RECENT]
            for row in rows:
                if row.get("against") == RECENT:
                    assert row["gain"] == pytest.approx(row["ndcg@10"] - recent["ndcg@10"], abs=2e-5)
            against = {row["against"] for row in rows if row["model"] == LOOK}
            assert against == ({RECENT, LONGER} | acting - {LOOK} if LOOK in acting else set())
    kept = sorted((folder / "work" / "back").iterdir())
    before = [path.stat().st_mtime_ns for path in kept]
    assert ask()["rows"] == result["rows"]
    assert [path.stat().st_mtime_ns for path in kept] == before
