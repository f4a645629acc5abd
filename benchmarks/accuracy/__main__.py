"""Takes a question from the command line to the module that answers it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.accuracy import __doc__ as about
from benchmarks.accuracy import (
    compare_back,
    compare_interleaved,
    compare_newest,
    compare_views,
    compare_walk,
    whole_runs,
)
from benchmarks.accuracy.ablation import Ablation
from benchmarks.accuracy.questions import QUESTIONS, current_name
from benchmarks.accuracy.variants import Setup
from benchmarks.common import ROOT, commit, record, result_file, table

VIEWS, WALK, BACK, NEWEST, INTERLEAVED = "views", "walk", "back", "newest", "interleaved"
PROTOCOL = (
    "Leave-one-out, test, full ranking, history of 20 items, seen items permitted, one beam for all rows. Settings and "
    "weights were chosen by validation NDCG@10 (`validation`). gain: of NDCG@10 against the row named in `against`, "
    "with a 95% interval by paired bootstrap over users. minutes: training, ancestors included, on a core shared with "
    "other work."
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=about,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "question",
        choices=(*whole_runs.QUESTIONS, VIEWS, WALK, BACK, NEWEST, INTERLEAVED, *QUESTIONS),
        type=current_name,
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder of the trained variants; default: runs/accuracy-NAME")
    parser.add_argument("--out", type=result_file, help="default: benchmarks/results/QUESTION-NAME.json")
    parser.add_argument("--only", help="train one variant (of whole runs: and measure it) without writing a result")
    parser.add_argument("--config", type=Path)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="device that trains and ranks (default: %(default)s)"
    )
    parser.add_argument("--seeds", default="0", help="comma-separated; whole runs take --set seed=N instead")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    name = options.data.resolve().name
    options.work = options.work or ROOT / "runs" / f"accuracy-{name}"
    options.out = options.out or ROOT / f"benchmarks/results/{options.question}-{name}.json"
    if options.question in whole_runs.QUESTIONS:
        return whole_runs.answer(parser, options)
    if options.question == VIEWS:
        return compare_views.answer(parser, options, whole_runs.command_of(options))
    if options.question == WALK:
        return compare_walk.answer(options, whole_runs.command_of(options))
    if options.question == BACK:
        return compare_back.answer(options, whole_runs.command_of(options))
    if options.question == NEWEST:
        return compare_newest.answer(options, whole_runs.command_of(options))
    if options.question == INTERLEAVED:
        return compare_interleaved.answer(options, whole_runs.command_of(options))
    question, code = QUESTIONS[options.question], commit()
    if options.question == "compression" and options.device != "cpu":
        parser.error("compression measures 8-bit weights, which run on a CPU; leave --device out")
    try:
        seeds = tuple(int(seed) for seed in options.seeds.split(","))
    except ValueError:
        parser.error(f"--seeds takes whole numbers separated by commas, not {options.seeds!r}")
    ablation = Ablation(Setup(options.data, options.work, options.config, tuple(options.set), options.device), seeds)
    wanted = [variant for variant in question.variants if ablation.permits(variant)]
    if options.only and options.only not in wanted:
        parser.error(f"--only takes one of {', '.join(wanted)}")
    for variant in [options.only] if options.only else wanted:
        ablation.train(variant)
    if options.only:
        return 0
    measuring = time.perf_counter()
    rows = question.rows(ablation)
    minutes = round(ablation.minutes(wanted) + (time.perf_counter() - measuring) / 60, 1)
    record(
        options.out,
        whole_runs.command_of(options),
        seeds,
        rows,
        minutes=minutes,
        data=name,
        protocol=PROTOCOL,
        validation=ablation.validation,
        checks=ablation.checks(wanted),
        **code,
        **ablation.trained_by(wanted),
    )
    same = ("same_checkpoint_as",) if any("same_checkpoint_as" in row for row in rows) else ()
    print(table(rows, (*question.columns, *same)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
