"""Processes that train as one: every shard together is the whole, and torchrun ends where one process does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.training.shops import command, write_shop
from tests.training.small import small_config, small_workspace
from tests.waiting import DEADLINE, eventually
from training.__main__ import main
from training.stages.distributed import WHOLE_BATCH, BatchShard, Process
from training.stages.pretrain import PretrainStep
from training.stages.rl import RlStep
from training.stages.rollouts import draw
from training.stages.sft import SftStep

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("batch", "parts", "world"), list(product(range(1, 8), range(1, 4), range(1, 4))))
def test_shards_divide_a_batch(batch, parts, world):
    rows = torch.arange(batch)
    seen, weight = [], 0.0
    for part, rank in product(range(parts), range(world)):
        shard = BatchShard(part, parts, rank, world).of(batch)
        micro_batch = shard.micro_batch(rows)
        local = shard.local(micro_batch)
        assert len(micro_batch) == shard.rows and len(local) >= 1
        assert micro_batch[shard.local_index].tolist() == local.tolist()
        loss, terms = shard.mean(torch.ones(()), {"x": 2.0})
        weight += float(loss)
        assert terms["x"] == pytest.approx(2 * float(loss))
        if float(loss):
            assert float(loss) == pytest.approx(len(local) / batch)
            seen += local.tolist()
    assert sorted(seen) == list(range(batch)) and weight == pytest.approx(1.0)


CASES = {
    "pretrain": (PretrainStep, "pretrain", ["pretrain.batch_size=7"]),
    "sft": (
        SftStep,
        "sft",
        ["sft.batch_size=7", "sft.balanced=false", "sft.preference_weight=0.1", "sft.preference_after=0"],
    ),
    "sft, contrastive": (SftStep, "sft", ["sft.batch_size=7", "sft.balanced=false", "sft.state_loss=contrastive"]),
    "sft, random labels": (SftStep, "sft", ["sft.batch_size=7", "sft.labels=random"]),
    "rl": (RlStep, "rl", ["rl.batch_size=7", "rl.group=4", "rl.policy_share=0"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_shards_of_all_processes_add_up_to_the_step_of_one(case):
    kind, stage, settings = CASES[case]
    config = small_config(*settings)

    def total(world: int) -> tuple[float, dict[str, float], list[torch.Tensor]]:
        work = small_workspace(config)
        steps = [kind(work, getattr(config, stage)) for _ in range(world)]
        loss, terms = 0.0, Counter()
        for rank, step in enumerate(steps):
            shard = BatchShard(0, 1, rank, world, draws=torch.Generator().manual_seed(5))
            part, values = step(0, shard)
            part.backward()
            loss += float(part.detach())
            terms.update({name: float(value) for name, value in values.items()})
        return loss, terms, [p.grad for p in work.network.parameters() if p.grad is not None]

    alone, terms, gradients = total(1)
    for world in (2, 3, 9):  # of 9 processes two have no row
        same, same_terms, same_gradients = total(world)
        assert same == pytest.approx(alone, rel=1e-5)
        if stage != "rl":  # spreads are not means of rows
            assert same_terms == pytest.approx(terms, rel=1e-4)
        for ours, theirs in zip(same_gradients, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_accumulated_micro_batches_add_up_too():
    config = small_config("sft.batch_size=7", "sft.balanced=false", "sft.labels=pause")

    def total(parts: int) -> tuple[float, list[torch.Tensor]]:
        work = small_workspace(config)
        step, loss = SftStep(work, config.sft), 0.0
        for part in range(parts):
            value, _ = step(0, BatchShard(part, parts, draws=torch.Generator().manual_seed(5)))
            value.backward()
            loss += float(value.detach())
        return loss, [p.grad for p in work.network.parameters() if p.grad is not None]

    alone, gradients = total(1)
    for parts in (2, 3):
        same, same_gradients = total(parts)
        assert same == pytest.approx(alone, rel=1e-5)
        for ours, theirs in zip(same_gradients, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_processes_draw_the_same_but_drop_out_differently():
    shards = [Process(rank, 2).shard(0, 1, "name").of(6) for rank in range(2)]
    whole = Process().shard(0, 1, "name").of(6).rand(6, 2)
    torch.testing.assert_close(torch.stack([shard.rand(3, 2) for shard in shards], 1).flatten(0, 1), whole)
    masks = []
    for rank in range(2):
        Process(rank, 2).shard(0, 1, "name")
        masks.append(torch.nn.functional.dropout(torch.ones(50), 0.5))
    assert not torch.equal(*masks)


def test_a_draw_follows_the_probabilities():
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 0.0, 0.6, 0.3]).log()
    tokens = draw(logits.expand(1, 20000, 4), WHOLE_BATCH)
    shares = torch.bincount(tokens.flatten(), minlength=4) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.0, 0.6, 0.3]), atol=0.02, rtol=0)
    assert shares[1] == 0


def test_bfloat16_trains(tmp_path):
    data = write_shop(tmp_path / "shop")
    losses = {}
    for precision in ("float32", "bfloat16"):
        out = tmp_path / precision
        assert main(command("sft", data, out, f"precision={precision}", "model.dropout=0")) == 0
        losses[precision] = {key: line["loss"] for key, line in log_of(out).items() if "loss" in line}
    for key, loss in losses["float32"].items():
        assert losses["bfloat16"][key] != loss  # it was used
        assert losses["bfloat16"][key] == pytest.approx(loss, rel=0.05)


# The real thing: processes under torchrun

SAME = (
    "model.dropout=0", "pretrain.batch_size=15", "sft.state_loss=contrastive", "sft.accumulate=2", "rl.accumulate=2",
    "rl.lr=1e-5",  # so that a sample that falls otherwise cannot lead elsewhere
)  # fmt: skip
COUNTED = ("recall", "ndcg", "score", "entropy", "unparsable")  # over users, each of whom counts whole


def torchrun(world: int, arguments: list[str]) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return subprocess.Popen([*launcher, "-m", "training", *arguments], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})  # fmt: skip


def log_of(out: Path) -> dict[tuple[str, int, bool], dict[str, float]]:
    lines = [json.loads(line) for line in (Path(f"{out}.work") / "log.jsonl").read_text().splitlines()]
    return {(line.pop("stage"), line.pop("step"), "loss" in line): line for line in lines}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `shop` and what one process makes of it, `one`."""
    folder = tmp_path_factory.mktemp("ranks")
    write_shop(folder / "shop")
    assert main(command("run", folder / "shop", folder / "one", *SAME)) == 0
    return folder


def test_resuming_with_another_number_of_processes_gives_the_same_weights(alone, tmp_path):
    arguments = command("run", alone / "shop", tmp_path / "b", *SAME)
    work = tmp_path / "b.work"
    process = torchrun(2, arguments)

    def begun() -> bool:
        assert process.poll() is None, process.communicate()
        return (work / "pretrain.latest.safetensors").exists() and meta(work, "pretrain")["step"] > 0

    eventually(begun)
    for worker in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(worker), signal.SIGKILL)
    process.communicate()
    assert 0 < meta(work, "pretrain")["step"] < 20
    assert main(command("pretrain", alone / "shop", tmp_path / "b", *SAME)) == 0
    process = torchrun(2, arguments)
    out, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, errors
    assert out.count("Wrote ") == out.count("training users") == 1  # one process speaks
    ours, theirs = log_of(tmp_path / "b"), log_of(alone / "one")
    assert ours.keys() == theirs.keys()
    for key, line in theirs.items():
        for name, value in line.items():
            if "spread" not in name:
                # Parts of a batch are rounded otherwise than the whole, and one item in another rank or one sample that
                # falls otherwise moves a mean over few users.
                close = 0.1 if key[0] == "rl" or name.startswith(COUNTED) else 5e-3
                assert ours[key][name] == pytest.approx(value, rel=5e-3, abs=close), (key, name)
    for stage in ("pretrain", "sft", "rl"):
        path = f"{stage}.latest.safetensors"
        mine, one = tensors_of(work / path), tensors_of(alone / "one.work" / path)
        assert mine.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(mine[name], value, atol=5e-3, rtol=2e-2, msg=lambda m, n=name: f"{n}: {m}")


def meta(work: Path, stage: str) -> dict[str, float]:
    with safe_open(work / f"{stage}.latest.safetensors", "pt") as file:
        return json.loads(file.metadata()["meta"])


def test_an_error_is_reported_once_and_ends_all_processes(tmp_path):
    data = write_shop(tmp_path / "shop")
    (data / "interactions.csv").write_text("user_id,timestamp\nu1,1\n")
    process = torchrun(2, command("run", data, tmp_path / "b"))
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode != 0
    assert len([line for line in errors.splitlines() if "streamrec: " in line]) == 1 and "item_id" in errors
