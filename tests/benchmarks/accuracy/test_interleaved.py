"""Steps between an item's tokens: the search that takes them, what trains them, and the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.ablation import Ablation
from benchmarks.accuracy.compare_interleaved import ARMS, NONE, PAUSE
from benchmarks.accuracy.interleaved import begin_steps, decode_with_steps, labels, search
from benchmarks.accuracy.variants import Setup
from training.data.shop import write_shop
from training.stages.predictions import predict_items
from training.stages.reasoning import teacher_force_directly
from training.workspace import Workspace

SMALL = """
    tokenizer.kind=random tokenizer.rqvae.codes=8 tokenizer.source=collaborative pretrain.similar_weight=0
    model.d_model=16 model.d_kv=8 model.d_ff=16 model.layers=1 model.heads=2 model.max_steps=4 model.max_items=4
    model.reasoning_codes=4 pretrain.steps=4 pretrain.eval_every=2 pretrain.warmup=0 pretrain.lr=1e-2 sft.steps=4
    sft.eval_every=2 sft.warmup=0 sft.lr=1e-2 rl.steps=0 evaluation.valid_users=5 evaluation.choice_users=5
    evaluation.beam=10
""".split()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    write_shop(folder, users=12, items=20, seed=0)
    return folder


@pytest.fixture(scope="module")
def work(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    ablation = Ablation(Setup(shop, tmp_path_factory.mktemp("work"), None, tuple(SMALL)), (0,))
    ablation.train("plain")
    return ablation.work("plain", 0)


def test_without_steps_it_is_the_search_that_is_served(work: Workspace):
    ranker, histories = work.ranker(), list(work.split.test_history)
    batch = ranker.encode(histories)
    items, scores, tokens = search(ranker.runtime, work, batch.cross, NONE, 10)
    served = ranker.search(batch, 0, 10)
    assert torch.equal(items, served.items)
    torch.testing.assert_close(scores, served.scores)
    assert tokens.shape == (len(histories), 0)


@pytest.mark.parametrize("arm", ARMS)
def test_training_scores_an_item_as_the_search_does(work: Workspace, arm: str):
    steps, ranker = begin_steps(work, *ARMS[arm]), work.ranker()
    batch = ranker.encode(list(work.split.test_history))
    with torch.inference_mode():
        items, scores, tokens = search(ranker.runtime, work, batch.cross, steps, 10)
        best = work.item_tokens[items[:, :1]]  # (B, 1, M)
        hidden, chosen = decode_with_steps(work, batch.cross, best, steps)
        direct, _ = teacher_force_directly(work.network, batch.cross, work.vocabulary.start_tokens[0], best)
        torch.testing.assert_close(predict_items(work, hidden).of(best).sum(-1)[:, 0], scores[:, 0])
        written = [
            work.network.t5.logits(output, steps.ids(level)).argmax(-1)[:, 0] + steps.ids(level)[0]
            for level, output in zip(steps.before, chosen, strict=True)
        ]
    assert torch.equal(torch.stack(written, 1), tokens)
    assert not torch.allclose(hidden, direct)  # a step changes what follows


def test_a_step_is_taught_the_cluster_of_the_code_that_follows(work: Workspace):
    steps = begin_steps(work, (0, 1), pause=False)
    table = work.network.t5.shared.weight.detach()
    item = work.item_tokens[:5].unsqueeze(1)
    taught = labels(work, item, steps)[:, 0]  # (5, 2)
    assert steps.count == 2
    for number, level in enumerate(steps.before):
        first, end = steps.ids(level)
        nearest = torch.cdist(table[item[:, 0, level]], table[first:end]).argmin(1) + first
        assert taught[:, number].tolist() == nearest.tolist()
    assert steps.ids(0)[1] == steps.ids(1)[0]  # a code means one thing before one level


def test_every_arm_is_compared_with_what_it_must_beat(shop: Path, tmp_path: Path):
    out = tmp_path / "interleaved.json"
    command = ["interleaved", "--data", str(shop), "--work", str(tmp_path / "work"), "--out", str(out), "--set", *SMALL]
    assert main(command) == 0
    found = json.loads(out.read_text())
    assert [check["model"] for check in found["checks"]] == list(ARMS)
    acting = [check["model"] for check in found["checks"] if check["acts"]]
    assert PAUSE in acting  # a pause has no entropy that it could lack
    for name in acting:
        against = {row["against"] for row in found["rows"] if row["model"] == name}
        assert against == {f"{name}, without", "plain, as costly"} | ({PAUSE} - {name})
        shares = [row for row in found["rows"] if row["model"] == f"{name}, where unsure"]
        assert {row["share"] for row in shares} == {0.0, 0.25, 0.5, 0.75, 1.0}
        assert {row["chosen"] for row in shares} == {True, False}
