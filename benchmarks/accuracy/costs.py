"""What a variant costs: FLOPs of a training step, FLOPs and processor time of an answer."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.accuracy.ranks import Inference, evaluation_users
from serving.network.onnx import OnnxRuntime
from serving.search.ranker import BATCH_SIZE
from training.config import RunConfig
from training.pipeline import TRAINED
from training.workspace import Workspace


def training_flops(work: Workspace, stage: str, config: RunConfig, steps: int = 12) -> float:
    """FLOPs of a training step, forward and backward, a mean over some. Matrix products only, as torch counts them, on
    the meta device, where shapes flow and nothing is computed: a batch made for a GPU would not fit everywhere.
    """
    torch.manual_seed(0)  # draws the lengths
    work = replace(work, config=config, network=copy.deepcopy(work.network)).on("meta")
    step = TRAINED[stage](work, getattr(config, stage))
    with FlopCounterMode(display=False) as counter:
        for number in range(steps):
            torch.autograd.backward(step(number)[0])
    return float(counter.get_total_flops()) / steps


@torch.no_grad()
def search_flops(work: Workspace, inference: Inference, count: int = 256) -> float:
    """FLOPs of one user's answer, encoding included. Matrix products only, as torch counts them."""
    histories, _ = evaluation_users(work, inference.split)
    longest, ranker, beam = work.settings.max_items, work.ranker(), work.config.evaluation.beam
    total, histories = 0.0, sorted(histories[:count], key=lambda history: min(len(history), longest))
    for first in range(0, len(histories), BATCH_SIZE["cpu"]):
        with FlopCounterMode(display=False) as counter:
            ranker.search(ranker.encode(histories[first : first + BATCH_SIZE["cpu"]]), inference.steps, beam)
        total += counter.get_total_flops()
    return total / len(histories)


@torch.no_grad()
def answer_ms(answers: Sequence[tuple[Workspace, Inference]], count: int = 100) -> list[float]:
    """Median ms of processor time of one user's answer by ONNX Runtime, encoding included, for each kind of answer.

    They take turns over the same users, so that other work on the machine slows all of them alike: their ratios mean
    more than the figures. The first tenth of the users warms up.
    """
    rankers = []
    for work, inference in answers:
        network, attention, threads = work.network.eval(), work.settings.attention, torch.get_num_threads()
        runtime = OnnxRuntime(network, work.item_tokens, attention, threads=threads, int8=inference.int8)
        rankers.append(work.ranker(runtime))
    spent = []
    for history in answers[0][0].split.test_history[:count]:
        row = []
        for (work, inference), ranker in zip(answers, rankers, strict=True):
            start = time.process_time()
            ranker.search(ranker.encode([history]), inference.steps, work.config.evaluation.beam)
            row.append(time.process_time() - start)
        spent.append(row)
    medians: list[float] = (1000 * np.median(spent[len(spent) // 10 :], 0)).tolist()
    return medians
