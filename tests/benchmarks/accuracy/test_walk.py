"""The pointer walk: its steps, what is trained of it, and the table."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.accuracy import small_modules
from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.compare_walk import ONCE, TWO_HOPS, second_hop
from benchmarks.accuracy.pointer_walk import START_POWER, Begin, Graph, Kind, Slots, Walk, best_slots
from benchmarks.accuracy.train_walk import ARMS, WALK, Arm, loss
from serving.items.neighbours import Neighbours
from training.data.shop import write_shop
from training.join import LEAST_LOG

ITEMS, WIDTH = 6, 4
SMALL = """
    tokenizer.kind=random tokenizer.rqvae.codes=8 tokenizer.source=collaborative pretrain.similar_weight=0
    model.d_model=16 model.d_kv=8 model.d_ff=16 model.layers=1 model.heads=2 model.max_steps=2
    pretrain.steps=6 pretrain.eval_every=2 pretrain.warmup=0 pretrain.lr=1e-2 sft.steps=0 rl.steps=0
    evaluation.valid_users=20 evaluation.choice_users=20 evaluation.steps=[0]
""".split()


@pytest.fixture
def graph() -> Graph:
    """0 leads to 1 and, a third as strongly, to 2; 1 to 3; nothing is known of the others."""
    offsets = np.array([0, 2, 3, 3, 3, 3, 3])
    return Graph.of(Neighbours(offsets, np.array([2, 1, 3], np.int32), np.array([1, 3, 5], np.float32), recency=1.0))


def begin(shares: list[float], rested: tuple[int, ...] = (), barred: tuple[int, ...] = ()) -> Begin:
    marks = torch.zeros(2, 1, ITEMS, dtype=torch.bool)
    marks[0, 0, list(rested)], marks[1, 0, list(barred)] = True, True
    state = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1))
    return Begin(state, best_slots(torch.tensor([shares])), *marks)


def walk_on(graph: Graph, kind: Kind = Kind()) -> Walk:  # noqa: B008
    torch.manual_seed(0)
    walk = Walk(torch.randn(ITEMS, WIDTH), graph, kind)
    with torch.no_grad():
        walk.log_hop.fill_(0.0)
    return walk


def test_a_walk_begins_as_the_memory(graph: Graph):
    (read,) = walk_on(graph)(begin([0.5, 0.25, 0, 0, 0.25, 0]), 1)
    expected = torch.tensor([0.5, 0.25, 0, 0, 0.25, 0]) ** START_POWER
    torch.testing.assert_close(read.dense(ITEMS)[0], expected / expected.sum())


def test_a_step_follows_the_graph_from_what_it_read(graph: Graph):
    walk = walk_on(graph)
    with torch.no_grad():
        walk.power.fill_(1.0)
    second = walk(begin([0.8, 0, 0, 0, 0.2, 0]), 2)[1].dense(ITEMS)[0]
    torch.testing.assert_close(second, torch.tensor([0.8, 0.6, 0.2, 0, 0.2, 0]) / 1.8)
    assert torch.equal(walk(begin([0.8, 0, 0, 0, 0.2, 0], rested=(0,)), 2)[1].dense(ITEMS)[0, 1:3], torch.zeros(2))
    barred = walk(begin([0.8, 0, 0, 0, 0.2, 0], barred=(1,)), 2)[1].dense(ITEMS)[0]
    torch.testing.assert_close(barred, torch.tensor([0.8, 0, 0.2, 0, 0.2, 0]) / 1.2)


def test_slots_of_one_item_add_up():
    slots = Slots(torch.tensor([[3, 1, 3]]), torch.tensor([[0.25, 0.5, 0.25]]).log())
    assert slots.log_of(torch.tensor([3])).exp().item() == pytest.approx(0.5)
    assert slots.log_of(torch.tensor([2])).item() < LEAST_LOG / 2
    assert slots.dense(5)[0].tolist() == pytest.approx([0, 0.5, 0, 0.5, 0])


def test_pauses_read_nothing_and_frozen_reads_know_no_state(graph: Graph):
    first = begin([0.5, 0.5, 0, 0, 0, 0])
    other = first._replace(state=-first.state)
    pauses, frozen, walk = (walk_on(graph, kind) for kind in (Kind(moves=False), Kind(queries=False), Kind()))
    with torch.no_grad():
        for each in (pauses, frozen, walk):
            torch.nn.init.eye_(each.query.weight)
    assert pauses(first, 3)[2].items.tolist() == first.slots.items.tolist()
    assert torch.equal(frozen(first, 3)[2].log_weight, frozen(other, 3)[2].log_weight)
    assert not torch.allclose(walk(first, 3)[2].log_weight, walk(other, 3)[2].log_weight)


@pytest.mark.parametrize("kind", ["hits", "likelihood"])
def test_the_gradient_moves_the_query_although_slots_are_empty(graph: Graph, kind):
    walk, first = walk_on(graph), begin([0.5, 0.25, 0, 0, 0.25, 0])
    for target in (4, 5):  # in a slot, and in none
        loss(walk, first, torch.tensor([target]), Arm(loss=kind)).backward()
        assert all(
            torch.isfinite(parameter.grad).all() for parameter in walk.parameters() if parameter.grad is not None
        )
    assert float(walk.query.weight.grad.norm()) > 0
    assert float(walk.scale.grad.abs()) > 0


def test_a_second_hop_goes_from_every_slot_at_once(graph: Graph):
    forms = second_hop(graph, ITEMS)(begin([0.5, 0.5, 0, 0, 0, 0]))
    torch.testing.assert_close(forms[-1][0], torch.tensor([0.5, 0.875, 0.125, 0.5, 0, 0]) / 2)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walk")
    write_shop(folder / "shop", users=60, items=40, seed=0)

    def ask() -> dict:
        out = folder / "result.json"
        arguments = ["walk", "--data", str(folder / "shop"), "--work", str(folder / "work"), "--out", str(out)]
        assert main([*arguments, "--set", *SMALL]) == 0
        return json.loads(out.read_text())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_modules, "EPOCHS", 1)
        yield folder, ask


def test_every_arm_that_acts_has_its_rows_and_a_second_call_trains_nothing(asked):
    folder, ask = asked
    result = ask()
    assert [(row["model"], row["excluded"]) for row in result["checks"]] == [
        (name, excluded) for excluded in (False, True) for name in ARMS
    ]
    for excluded in (False, True):
        acting = {row["model"] for row in result["checks"] if row["acts"] and row["excluded"] == excluded}
        rows = [row for row in result["rows"] if row["excluded"] == excluded]
        assert {row["model"] for row in rows} == {ONCE, TWO_HOPS} | acting
        once = next(row for row in rows if row["model"] == ONCE)
        for row in rows:
            if row.get("against") == ONCE:
                assert row["gain"] == pytest.approx(row["ndcg@10"] - once["ndcg@10"], abs=2e-5)
        shown = [row["form"] for row in rows if row["model"] == WALK and row["against"] == TWO_HOPS]
        assert shown == ([f"l = {step}" for step in range(1, 5)] if WALK in acting else [])
    kept = sorted((folder / "work" / "walk").iterdir())
    before = [path.stat().st_mtime_ns for path in kept]
    assert ask()["rows"] == result["rows"]
    assert [path.stat().st_mtime_ns for path in kept] == before
