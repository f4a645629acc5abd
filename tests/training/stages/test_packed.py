"""One encoder pass for all prefixes of a sequence: the losses and gradients of the prefixes one by one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from serving.types import EventData
from tests.training.small import small_config, small_workspace
from training.config import PretrainConfig, SftConfig
from training.data.examples import Windows, batch_at
from training.stages.distributed import BatchShard
from training.stages.losses import full_softmax, nll
from training.stages.predictions import predict_items
from training.stages.pretrain import PretrainStep
from training.stages.reasoning import teacher_force_directly
from training.stages.sft import SftStep
from training.workspace import Workspace, make_workspace

PACKED = ("model.attention=causal-by-item", "model.age_bias=true", "model.end_token=false", "model.layers=2")


def packed_workspace(*overrides: str) -> Workspace:
    """Sequences of up to 12 events with a history of 5: the longer ones take several windows."""
    work = small_workspace(small_config(*PACKED, *overrides))
    rng = np.random.default_rng(3)
    train = [rng.integers(0, 30, rng.integers(2, 13)).astype(np.int32) for _ in range(40)]
    times = [np.sort(1e9 + rng.exponential(1e4, len(events)) ** rng.choice([0.5, 1, 1.5])) for events in train]
    events = [EventData(np.ones(len(own), np.float32), own) for own in times]
    split = dataclasses.replace(work.split, train=train, train_events=events)
    codes = work.item_tokens_np - np.array(work.vocabulary.level_offsets)
    made = make_workspace(work.config, split, codes, work.vocabulary.codebook_sizes, work.embedding)
    for parameter in made.network.heads.parameters():  # zero at the start would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def prefixes(windows: Windows, index: np.ndarray) -> list[tuple[np.ndarray, np.ndarray | None, int]]:
    """Histories, their times and next items of all targets."""
    found = []
    for row in index:
        span = slice(windows.start[row], windows.start[row] + windows.first[row] + windows.counts[row])
        items, times = windows.sequence[span], None if windows.times is None else windows.times[span]
        ends = range(windows.first[row], len(items))
        found += [(items[:at], None if times is None else times[:at], int(items[at])) for at in ends]
    return found


def one_by_one(work: Workspace, config: PretrainConfig, index: np.ndarray) -> dict[str, torch.Tensor]:
    """The losses of the targets, each with an encoder pass of its own, as serving does it."""
    pairs, network = prefixes(work.windows, index), work.network
    plain, of_state = [], []
    for history, times, item in pairs:
        target, cross = work.item_tokens[item][None, None], work.encode([history], [times])
        hidden, state = teacher_force_directly(network, cross, work.vocabulary.start_tokens[0], target)
        plain.append(nll(predict_items(work, hidden), target, config.label_smoothing))
        vectors = network.item_vectors(work.item_tokens)
        of_state.append(full_softmax(state[0], vectors, torch.tensor([item]), config.label_smoothing))
    return {"nll": torch.stack(plain).mean(), "state": torch.stack(of_state).mean()}


@pytest.mark.parametrize("reads", [[], ["model.time_bias=true"], ["model.item_input=true"]])
def test_the_packed_loss_of_a_batch_is_that_of_its_prefixes_one_by_one_and_so_are_the_gradients(reads):
    work = packed_workspace(*reads)
    if work.network.reads_items:
        work.network.eval()  # else some items would be forgotten, others in each pass
        torch.nn.init.normal_(work.network.heads.item_input.weight)
    config = PretrainConfig(batch_size=24, similar_weight=0, state_weight=1, label_smoothing=0.1)
    step = PretrainStep(work, config)
    assert set(work.windows.first.tolist()) == {1, 4}  # whole sequences, and pieces of longer ones
    gradients = []
    for number in range(6):
        batch = step.batch(number)
        total, terms = step(number)
        expected = one_by_one(work, config, batch)
        assert float(terms["nll"]) == pytest.approx(float(expected["nll"].detach()), abs=1e-4)
        assert float(terms["state"]) == pytest.approx(float(expected["state"].detach()), abs=1e-4)
        gradients.append([torch.autograd.grad(loss, work.network.parameters(), allow_unused=True)
                          for loss in (total, expected["nll"] + expected["state"])])  # fmt: skip
    for ours, theirs in gradients:
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_the_parts_of_a_packed_batch_add_up_to_it(parts):
    work = packed_workspace()
    step = PretrainStep(work, PretrainConfig(batch_size=24, similar_weight=0, state_weight=1))
    for number in range(4):
        whole, terms = step(number)
        shards = [step(number, BatchShard(part, parts)) for part in range(parts)]
        assert float(sum(loss.detach() for loss, _ in shards)) == pytest.approx(float(whole.detach()), abs=1e-4)
        assert float(sum(part["nll"] for _, part in shards)) == pytest.approx(float(terms["nll"]), abs=1e-4)
    ranks = [step(0, BatchShard(0, 1, rank, 2)) for rank in range(2)]
    assert float(sum(loss.detach() for loss, _ in ranks)) == pytest.approx(float(step(0)[0].detach()), abs=1e-4)


def test_similar_items_are_drawn_for_every_target():
    work = packed_workspace()
    step = PretrainStep(work, PretrainConfig(batch_size=24, similar_weight=0.5, plain_weight=0, neighbours=3))
    item = np.array([[4, 9], [7, 0]])
    drawn = step.similar(item, BatchShard().of(2))
    assert drawn.shape == (2, 2, 3)
    for row in range(2):
        for target in range(2):
            near = work.item_tokens[step.nearest[item[row, target]]]
            assert (near == drawn[row, target]).all(-1).any()
    loss, _ = step(0)
    assert loss.isfinite()


@pytest.mark.parametrize(("state_loss", "timed"), [("contrastive", "false"), ("full_softmax", "true")])
def test_stage_2_has_the_loss_and_gradients_of_an_encoder_pass_per_history(state_loss, timed, monkeypatch):
    work = packed_workspace(f"sft.state_loss={state_loss}", "sft.preference_weight=1", f"model.time_bias={timed}")
    step = SftStep(work, SftConfig(batch_size=24, state_loss=state_loss, preference_weight=1, preference_after=0))
    for number in range(3):
        batch = batch_at(work.windows, 24, work.config.seed + 1, number)
        assert len(np.unique(work.windows.examples(batch).start)) < work.windows.counts[batch].sum()
        results = []
        for encode in (Workspace.encode_examples, Workspace.encode_rows):
            monkeypatch.setattr(Workspace, "encode_examples", encode)
            loss, terms = step(number, BatchShard(draws=torch.Generator().manual_seed(number)))
            gradients = torch.autograd.grad(loss, work.network.parameters(), allow_unused=True)
            results.append((terms, gradients))
        (ours, mine), (theirs, others) = results
        assert {"nll_plain", "nll_answer", "state", "preference"} <= ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert float(value) == pytest.approx(float(theirs[name]), abs=1e-4), name
        for gradient, other in zip(mine, others, strict=True):
            assert (gradient is None) == (other is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, other, atol=1e-4, rtol=1e-3)
        monkeypatch.undo()


def test_examples_that_begin_together_share_an_encoder_pass(monkeypatch):
    work = packed_workspace()
    examples = work.windows.examples(np.arange(5))
    seen = []
    encode = Workspace.encode
    monkeypatch.setattr(
        Workspace, "encode", lambda work, histories: (seen.append(len(histories)), encode(work, histories))[1]
    )
    cross = work.encode_examples(examples, np.arange(len(examples)))
    assert seen == [5] and len(cross.bias) == len(cross.layers[0][0]) == len(examples) > 5
