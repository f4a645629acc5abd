"""Killed anywhere and run again, training ends with the weights of an uninterrupted run."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.training.shops import command, write_shop
from tests.training.small import small_config, small_workspace
from tests.waiting import DEADLINE, eventually
from training import pipeline
from training.__main__ import main
from training.config import StageConfig
from training.stages import loop
from training.stages.distributed import BatchShard
from training.stages.loop import Log, run_stage

ROOT = Path(__file__).parents[3]
FILES = ("model/model.safetensors", "heads.safetensors", "catalogue.parquet")


PROCESSES = multiprocessing.get_context("forkserver")  # each a process of its own, without seconds of imports
PROCESSES.set_forkserver_preload(["training.__main__", "torch.utils.tensorboard", "torch._dynamo", "transformers"])


def launch(data: Path, out: Path) -> ForkServerProcess:
    process = PROCESSES.Process(target=main, args=(command("run", data, out),))
    process.start()
    return process


def steps_done(work: Path, stage: str) -> int:
    try:
        with safe_open(work / f"{stage}.latest.safetensors", "pt") as file:
            return json.loads(file.metadata()["meta"])["step"]
    except FileNotFoundError:
        return -1


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "after the semantic IDs": lambda work: (work / "semantic_ids.safetensors").exists(),
    "in stage 2": lambda work: steps_done(work, "sft") >= 5,
    "as stage 3 begins": lambda work: (work / "rl.best.safetensors").exists(),
    "while the bundle is made": lambda work: (work / "stages.json").exists(),
}


def test_kill_9_at_any_moment_does_not_change_the_weights(tmp_path):
    data = write_shop(tmp_path / "shop")
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    arguments = [sys.executable, "-m", "training", *command("run", data, undisturbed)]
    whole = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed, work = [], tmp_path / "disturbed.work"
    for reached in MOMENTS.values():
        process = launch(data, disturbed)
        eventually(lambda process=process, reached=reached: reached(work) or process.exitcode is not None)
        process.kill()
        process.join()
        killed.append(process.exitcode)
    # A slow machine may notice the last moment when all is over.
    assert killed[:-1] == [-9] * (len(MOMENTS) - 1) and killed[-1] in (-9, 0)
    last = launch(data, disturbed)
    last.join(DEADLINE)
    assert (last.exitcode, whole.wait(DEADLINE)) == (0, 0)
    for name in FILES:
        digests = {hashlib.sha256((folder / name).read_bytes()).hexdigest() for folder in (undisturbed, disturbed)}
        assert len(digests) == 1, name
    first, second = (json.loads((folder / "bundle.json").read_text()) for folder in (undisturbed, disturbed))
    for manifest in (first, second):
        for row in (*manifest["accuracy"], *manifest["about"]["choices"]):
            del row["seconds"]
        for stage in manifest["about"]["stages"].values():
            del stage["seconds"]
    assert first["accuracy"] == second["accuracy"] and first["about"] == second["about"]


class Killed(BaseException):
    """What no code may catch, as no code can catch SIGKILL."""


def train(
    folder: Path, die_at: int | None, monkeypatch: pytest.MonkeyPatch, patience: int = 0
) -> tuple[dict[str, torch.Tensor], loop.Outcome]:
    """A stage of 12 steps with dropout, a sometimes unused parameter and a validation that does not always improve.

    die_at: dies at the so-many-th write, step or evaluation of this process.
    """
    torch.manual_seed(0)
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    network = torch.nn.ModuleList([first, second])
    events = 0

    def live() -> None:
        nonlocal events
        events += 1
        if events == die_at:
            raise Killed

    def step(number: int, _: BatchShard) -> tuple[torch.Tensor, dict[str, float]]:
        live()
        x = torch.randn(5, 4)
        y = torch.nn.functional.dropout(first(x), 0.3)
        return (second(y) if number % 4 == 3 else y).square().mean(), {}

    def evaluate() -> dict[str, Any]:
        live()
        return {"score": -abs(float(first.weight.detach().norm()) - 0.8)}  # falls through 0.8 as it trains

    def dying_save(*arguments: Any) -> None:
        live()
        save(*arguments)
        live()

    save = loop.save_checkpoint
    config = StageConfig(steps=12, batch_size=1, lr=0.05, warmup=3, eval_every=2, checkpoint_every=3, patience=patience)
    with monkeypatch.context() as patched, closing(Log(folder)) as log:
        patched.setattr(loop, "save_checkpoint", dying_save)
        outcome = run_stage("stage", network, config, 0, folder, step, evaluate, log)
    return {name: value.clone() for name, value in network.state_dict().items()}, outcome


@pytest.mark.parametrize("patience", [0, 2])
def test_a_stage_killed_at_any_step_write_or_evaluation_ends_with_the_same_weights(tmp_path, monkeypatch, patience):
    weights, outcome = train(tmp_path / "whole", None, monkeypatch, patience)
    assert 0 < outcome.best_step < 12  # so that the best weights are neither the first nor the last
    last = loop.read_meta(tmp_path / "whole/stage.latest.safetensors")["step"]
    assert last == (outcome.best_step + 2 * patience if patience else 12) and (patience == 0 or last < 12)
    moments = 0
    for die_at in range(1, 100, 4 if patience else 1):  # a run that ends early dies at fewer moments, to save time
        folder = tmp_path / str(die_at)
        try:
            train(folder, die_at, monkeypatch, patience)
            break  # it got to the end before the moment came
        except Killed:
            moments += 1
        again, same = train(folder, None, monkeypatch, patience)
        assert (same.best, same.best_step) == (outcome.best, outcome.best_step), die_at
        assert all(torch.equal(again[name], value) for name, value in weights.items()), die_at
        with safe_open(folder / "stage.latest.safetensors", "pt") as ours:
            with safe_open(tmp_path / "whole/stage.latest.safetensors", "pt") as theirs:
                assert list(ours.keys()) == list(theirs.keys())
                assert all(torch.equal(ours.get_tensor(k), theirs.get_tensor(k)) for k in ours.keys()), die_at
    assert moments > (4 if patience else 25)


@pytest.mark.parametrize("competes", [True, False])
def test_what_a_stage_starts_with_competes_or_does_not(competes, tmp_path):
    config = StageConfig(steps=4, eval_every=2, warmup=0, checkpoint_every=2)
    network, scores = torch.nn.Linear(2, 1), iter([0.9, 0.3, 0.2])

    def step(number: int, _: BatchShard) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return network(torch.ones(2)).sum(), {}

    with closing(Log(tmp_path, silent=True)) as log:
        outcome = run_stage("sft", network, config, 0, tmp_path, step, lambda: {"score": next(scores)}, log,
                            start_competes=competes)  # fmt: skip
    assert (outcome.best_step, outcome.best["score"]) == ((0, 0.9) if competes else (2, 0.3))


def test_stage_2_alone_does_not_keep_its_start(tmp_path, monkeypatch):
    """With reasoning or without: the start of a run without could be kept, where one with it cannot reason yet."""
    seen = {}

    def noted(stage: str, *_: object, start_competes: bool = True, **__: object) -> None:
        seen[stage] = start_competes

    monkeypatch.setattr(pipeline, "run_stage", noted)
    for settings in ((), ("lengths=[0]", "evaluation.steps=[0]")):
        work = small_workspace(small_config(*settings))
        with closing(Log(tmp_path, silent=True)) as log:
            for stage in pipeline.TRAINED:
                pipeline.train_stage(stage, work, tmp_path, log)
        assert seen == {"pretrain": True, "sft": False, "rl": True}


PACKED = "model.attention=causal-by-item model.age_bias=true model.end_token=false pretrain.state_weight=1"


@pytest.mark.parametrize("setting", ["sft.preference_weight=1 sft.preference_after=1", "rl.group=4", PACKED])
def test_a_resumed_stage_has_the_same_reference_weights(setting, tmp_path, monkeypatch):
    """Killed in the middle of a stage whose loss compares with earlier weights, and run again."""
    stages = ("pretrain", "sft", "rl") if setting.startswith("rl.") else ("pretrain", "sft")
    config = small_config(*setting.split(), *(f"{stage}.{what}" for stage in stages for what in (
        "steps=4", "batch_size=8", "checkpoint_every=2", "eval_every=0", "warmup=0", "lr=0.01")))  # fmt: skip
    last = pipeline.TRAINED[stages[-1]]

    class Dying(last):  # type: ignore[misc, valid-type]
        def __call__(self, step: int, shard: BatchShard) -> tuple[torch.Tensor, dict[str, float]]:
            if step == 3:
                raise Killed
            return super().__call__(step, shard)

    def run(folder: Path) -> dict[str, torch.Tensor]:
        work = small_workspace(config)
        with closing(Log(folder)) as log:
            for stage in stages:
                pipeline.train_stage(stage, work, folder, log)
        with safe_open(folder / f"{stages[-1]}.latest.safetensors", "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}

    undisturbed = run(tmp_path / "undisturbed")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setitem(pipeline.TRAINED, stages[-1], Dying)
        run(tmp_path / "killed")
    again = run(tmp_path / "killed")
    assert again.keys() == undisturbed.keys()
    assert all(torch.equal(again[name], value) for name, value in undisturbed.items())


def test_a_stage_killed_repeatedly_ends_with_the_same_weights(tmp_path, monkeypatch):
    weights, _ = train(tmp_path / "whole", None, monkeypatch)
    deaths, again = 0, None
    while again is None:
        try:
            again, _ = train(tmp_path / "often", 9, monkeypatch)
        except Killed:
            deaths += 1
        assert deaths < 60
    assert deaths > 2
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_a_stage_cannot_make_validation_worse(tmp_path):
    network = torch.nn.Linear(2, 2)
    before = network.weight.detach().clone()
    scores = iter([1.0, 0.5, 0.7])
    log = Log(tmp_path)
    outcome = run_stage("s", network, StageConfig(steps=4, eval_every=2, lr=0.1, warmup=0), 0, tmp_path,
                        lambda *_: (network(torch.ones(1, 2)).sum(), {}), lambda: {"score": next(scores)},
                        log)  # fmt: skip
    log.close()
    assert (outcome.best_step, outcome.best["score"]) == (0, 1.0)
    assert torch.equal(network.weight, before)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    config = StageConfig(steps=110, warmup=10)
    factors = [loop.learning_rate_factor(step, config) for step in range(111)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0 and factors[10] == pytest.approx(1.0)
    assert factors[60] == pytest.approx(0.55)  # half way: 0.55 + 0.45 cos(pi / 2)
    assert factors[110] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_weight_decay_leaves_embeddings_norms_and_biases_alone():
    network = torch.nn.ModuleDict({"shared": torch.nn.Embedding(3, 2), "wi": torch.nn.Linear(2, 2)})
    decayed, free = loop._groups(network, 0.1)
    assert [p is network["wi"].weight for p in decayed["params"]] == [True] and decayed["weight_decay"] == 0.1
    assert len(free["params"]) == 2 and free["weight_decay"] == 0.0


def test_a_stage_takes_the_steps_of_adamw_on_clipped_gradients(tmp_path):
    """Against the loop written out: the mean of two micro-batches, clipping, warm-up, decay of matrices alone."""
    config = StageConfig(steps=5, batch_size=4, accumulate=2, lr=0.02, warmup=3, clip_norm=0.05, weight_decay=0.5,
                         eval_every=0, checkpoint_every=5)  # fmt: skip
    inputs = torch.randn(config.steps, 4, 3, generator=torch.Generator().manual_seed(1))

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Linear(3, 2)

    trained = network()
    scores = iter(range(10))

    def step(number: int, shard: BatchShard) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        shard = shard.of(4)
        return shard.mean(trained(shard.micro_batch(inputs[number])).square().sum(-1).mean(), {})

    with closing(Log(tmp_path)) as log:
        run_stage("stage", trained, config, 0, tmp_path, step, lambda: {"score": next(scores)}, log)
    expected = network()
    optimiser = torch.optim.AdamW(
        [{"params": [expected.weight], "weight_decay": 0.5}, {"params": [expected.bias], "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    for number in range(config.steps):
        for group in optimiser.param_groups:
            group["lr"] = 0.02 * loop.learning_rate_factor(number, config)
        optimiser.zero_grad()
        expected(inputs[number]).square().sum(-1).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.05)
        assert norm > 0.05
        optimiser.step()
    for found, wanted in zip(trained.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_stage_ends_with_the_weights_that_were_best(tmp_path):
    network = torch.nn.Linear(1, 1)
    seen, scores = [], iter([0.1, 0.3, 0.9, 0.9, 0.2])

    def evaluate() -> dict[str, Any]:
        seen.append(network.weight.detach().clone())
        return {"score": next(scores)}

    config = StageConfig(steps=4, batch_size=1, lr=0.1, warmup=1, eval_every=1, checkpoint_every=2)
    with closing(Log(tmp_path)) as log:
        outcome = run_stage(
            "stage",
            network,
            config,
            0,
            tmp_path,
            lambda *_: (network(torch.ones(1, 1)).square().mean(), {}),
            evaluate,
            log,
        )
    assert (outcome.best, outcome.best_step) == ({"score": 0.9}, 2)  # the first of two that are equal
    assert torch.equal(network.weight, seen[2]) and not torch.equal(network.weight, seen[4])
    assert not network.training


def test_the_log_has_losses_evaluations_and_why_a_stage_ended_and_the_screen_no_losses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    network = torch.nn.Linear(1, 1)
    scores = iter([0.5, 0.4, 0.3])
    config = StageConfig(
        steps=9, batch_size=1, lr=0.1, warmup=1, eval_every=2, checkpoint_every=100, patience=2, clip_norm=1.0
    )

    def step(*_: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return network(torch.ones(1, 1)).sum(), {"part": torch.tensor(2.0)}

    with closing(Log(tmp_path)) as log:
        run_stage("stage", network, config, 0, tmp_path, step, lambda: {"score": next(scores)}, log)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line.pop("stage") for line in lines} == {"stage"}
    assert [(line["step"], sorted(line)[0]) for line in lines] == [
        (0, "score"), (2, "grad_norm"), (2, "score"), (4, "grad_norm"), (4, "score"), (4, "ended"),
    ]  # fmt: skip
    assert lines[1]["part"] == 2.0 and lines[1]["grad_norm"] == pytest.approx(2**0.5)  # of weight and bias
    assert lines[5]["ended"] == "no better evaluation since step 0"
    assert capsys.readouterr().out.splitlines() == [
        "[stage 0] score 0.5000",
        "[stage 2] score 0.4000",
        "[stage 4] score 0.3000",
        "[stage 4] ended no better evaluation since step 0",
    ]
