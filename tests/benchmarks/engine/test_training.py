"""The training benchmark's contenders train the same thing: same loss on the same batch, a sensible table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.engine.training import (
    BFLOAT16,
    PACKED,
    ROWS,
    TASKS,
    measure,
    transformers_loss,
    transformers_twin,
    workspaces,
)
from serving.items.histories import history_tokens
from training.config import PretrainConfig
from training.data.examples import batch_at
from training.stages.pretrain import PretrainStep
from training.workspace import Workspace


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workspace]:
    return workspaces(None, tmp_path_factory.mktemp("training"), users=60)


@pytest.mark.parametrize("task", TASKS)
def test_both_loops_have_the_same_loss_and_gradient(forms, task):
    work = forms[ROWS]
    config = PretrainConfig(batch_size=32, similar_weight=TASKS[task], label_smoothing=0)
    step = PretrainStep(work, config)
    work.network.eval()
    work.network.zero_grad()
    torch.manual_seed(3)
    ours, _ = step(0)
    ours.backward()
    index = batch_at(work.examples, 32, work.config.seed, 0)
    histories = work.examples.histories(index)
    tokens, mask = history_tokens(histories, work.item_tokens_np, work.settings.max_items, work.suffix)
    model = transformers_twin(work).eval()
    torch.manual_seed(3)
    batch = {"input_ids": tokens, "attention_mask": mask.long(), "item": work.examples.targets(index)}
    theirs = transformers_loss(work, config, model, step, batch)
    theirs.backward()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-4)
    for name, parameter in work.network.t5.named_parameters():
        twin = model.get_parameter(name)
        torch.testing.assert_close(parameter.grad, twin.grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_a_row_per_contender_and_the_plain_loop_is_the_measure(forms, tmp_path: Path):
    rows = measure(forms, "plain", rounds=1, folder=tmp_path)
    assert [row["contender"] for row in rows] == ["transformers", ROWS, PACKED, BFLOAT16]
    assert rows[0]["ratio"] == rows[1]["to_rows"] == 1.0
    assert {row["examples"] for row in rows} == {len(forms[ROWS].examples)} == {forms[PACKED].windows.counts.sum()}
    speed = [row["examples_per_second"] for row in rows]
    assert rows[1]["ratio"] == pytest.approx(speed[1] / speed[0], rel=0.02)
    assert np.isfinite(speed).all()
