"""How stage 2 begins: tokens that differ, from data and seed alone, and a run that ends where they collapse."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from tests.training.shops import command, write_shop
from tests.training.small import overfit, small_config, small_workspace
from training.__main__ import main
from training.stages import loop
from training.stages.begin import (
    CollapseError,
    begin_reasoning,
    centres,
    check_collapse,
    first_residuals,
    supervises_reasoning_tokens,
)
from training.stages.diagnostics import pairwise_cosine
from training.stages.pretrain import PretrainStep
from training.stages.reasoning import teacher_force_directly
from training.workspace import Workspace


def after_stage_1(*settings: str) -> Workspace:
    """With reasoning codes that are one vector, as a softmax over everything left them."""
    config = small_config("pretrain.batch_size=24", *settings)
    work = small_workspace(config)
    overfit(PretrainStep(work, config.pretrain), work.network, "nll", updates=20)
    lo, hi = work.vocabulary.reasoning_range
    with torch.no_grad():
        work.network.t5.shared.weight[lo:hi] = work.network.t5.shared.weight[lo]
    work.network.eval()
    return work


def test_codes_are_the_centres_of_what_the_first_step_has_to_say():
    work = after_stage_1()
    lo, hi = work.vocabulary.reasoning_range
    codes = work.network.t5.shared.weight.detach()
    assert pairwise_cosine(codes[lo:hi]) == pytest.approx(1, abs=1e-4)
    begin_reasoning(work)
    assert pairwise_cosine(codes[lo:hi]) < 0.7
    residuals = first_residuals(work)
    assert residuals.shape == (len(work.examples), 16)
    distance, nearest = torch.cdist(residuals, codes[lo:hi]).min(1)
    assert len(nearest.unique()) == hi - lo  # every code is some example's
    assert distance.square().mean() < 0.7 * (residuals - residuals.mean(0)).square().sum(1).mean()
    for code in range(hi - lo):  # k-means: a centre is the mean of its members
        torch.testing.assert_close(codes[lo + code], residuals[nearest == code].mean(0), atol=1e-3, rtol=1e-3)


def test_every_number_of_steps_starts_where_the_direct_answer_does_and_residuals_pass_unchanged():
    work = after_stage_1()
    begin_reasoning(work)
    work.network.requires_grad_(False)
    cross, item = work.encode([work.split.train[0]]), work.item_tokens[:1].unsqueeze(1)
    outputs = [teacher_force_directly(work.network, cross, start, item)[0] for start in work.vocabulary.start_tokens]
    for other in outputs[1:]:
        assert torch.equal(other, outputs[0])
    residuals = first_residuals(work)
    torch.testing.assert_close(work.network.heads.residual(residuals), residuals, atol=1e-4, rtol=1e-4)


def test_the_beginning_follows_from_weights_and_seed():
    one, again, other = (after_stage_1(f"seed={seed}") for seed in (0, 0, 1))
    for work in (one, again, other):
        begin_reasoning(work)
    tables = [work.network.t5.shared.weight for work in (one, again, other)]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


def test_item_codes_that_are_reasoning_codes_stay_as_they_are():
    work = after_stage_1("model.reasoning_codes=0")
    before = work.network.t5.shared.weight.detach().clone()
    begin_reasoning(work)
    first = work.vocabulary.item_offset
    assert torch.equal(work.network.t5.shared.weight[first:], before[first:])


def test_fewer_points_than_codes_still_give_codes_that_differ():
    found = centres(torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 0.0]]), 5, seed=0)
    assert found.shape == (5, 2) and len(found.unique(dim=0)) == 5 and found.isfinite().all()


def test_a_collapse_ends_the_run_and_a_spread_does_not(tmp_path):
    work = small_workspace(small_config("sft.entropy_floor=0.5"))
    lo, hi = work.vocabulary.reasoning_range
    at_the_floor = 0.5 * np.log(hi - lo)
    spread = {"entropy/1": at_the_floor + 0.1, "entropy/2": at_the_floor - 0.05, "score": 0.0}
    collapsed = {"entropy/1": at_the_floor - 0.1, "entropy/2": at_the_floor, "score": 1.0}
    for stage in ("sft", "rl"):
        check_collapse(work, stage, tmp_path, spread)
        with pytest.raises(CollapseError) as error:
            check_collapse(work, stage, tmp_path, collapsed)
        assert re.search(r"entropy over users is 0\.\d\d nats", str(error.value))
        for words in (f"a lower {stage}.lr", "sft.entropy_floor=0", f"choose another --out or remove {tmp_path}."):
            assert words in str(error.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), True),
        (("sft.labels=pause",), False),
        (("model.step_form=state",), False),
        (("sft.reasoning_weight=0",), False),
        (("lengths=[1]",), False),  # validation measures l = 2
        (("lengths=[0]", "evaluation.steps=[0]"), False),
    ],
)
def test_only_tokens_that_are_taught_to_differ_are_checked(settings, expected):
    assert supervises_reasoning_tokens(small_workspace(small_config(*settings))) is expected


def test_the_command_begins_apart_and_ends_at_a_collapse_in_one_sentence(tmp_path, capsys, monkeypatch):
    data = write_shop(tmp_path / "shop")
    monkeypatch.setattr(loop, "UNCHECKED_STEPS", 0)
    assert main(command("sft", data, tmp_path / "b", "sft.entropy_floor=0.99")) == 2
    assert "reasoning tokens have collapsed" in capsys.readouterr().err.splitlines()[-1]
    lines = [json.loads(line) for line in (tmp_path / "b.work/log.jsonl").read_text().splitlines()]
    cosines = [line["codes/cosine"] for line in lines if line["stage"] == "sft" and "codes/cosine" in line]
    assert len(cosines) == 2  # at the start, and at the evaluation that ended the run


def test_a_trial_run_of_a_few_steps_is_not_checked(tmp_path):
    assert main(command("sft", write_shop(tmp_path / "shop"), tmp_path / "b", "sft.entropy_floor=0.99")) == 0
