"""The questions about whole runs: each variant is trained and measured on its own, under `WORK/VARIANT`.

Everything is kept under --work, so the same command goes on after a kill; `--only NAME` trains and measures one variant
(several cores: one process each), and a last call without it writes the result.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.accuracy import converged
from benchmarks.accuracy.variants import SEEN_PERMITTED, share_cache
from benchmarks.common import commit, record, table
from serving.types import BundleSettings
from training.config import RunConfig
from training.config_file import ConfigError, load_config
from training.data.prepare import split_by
from training.data.read import Dataset, read_data
from training.evaluate import measure
from training.export import choose
from training.memory import fit_memory
from training.pipeline import read_given_ids, run, tokenize
from training.stages.loop import load_checkpoint, read_meta
from training.workspace import Workspace

QUESTIONS = {  # what each asks
    "stages": "stages 1, 2 and 3 at several numbers of steps, against a plain model of as many training steps",
    "longer": "a plain model trained twice as long, with more dropout and smoothed labels against overfitting",
    "converged": "a plain model trained until validation no longer rises, alone and mixed with the item memory",
    "codes": "a plain model on three levels of 64 codes, to compare with that of `stages`",
    "encoder": "T5's own encoder, one that is causal by item, and that with item ages instead of an end token, which "
    "can be trained on packed sequences",
    "ids": "semantic IDs of text and behaviour together, and of text alone",
}
BEAM = 50
WEIGHTS, METRICS = ("dense_weight", "neighbours_weight"), ("recall@5", "recall@10", "ndcg@5", "ndcg@10")
COLUMNS = ["model", "steps", *WEIGHTS, "excluded", *METRICS, "minutes"]
GAINS = ["gain", "low", "high", "percent", "against"]
PROTOCOL = (
    "Leave-one-out, test, full ranking, history of 20 items, beam 50; every row once with and once without the items "
    "of the history excluded. Stages keep their best weights by validation NDCG@10, and validation (nothing excluded) "
    "chose steps and weights of the deployed row. minutes: training up to the row's weights, one busy core."
)


def variants_of(question: str, config: RunConfig) -> dict[str, list[str]]:
    """Overrides per variant. The plain variant takes as many steps as the three stages together."""
    if config.rl.steps is None:
        raise ConfigError("Give rl.steps: the plain variant takes as many steps as the three stages together.")
    total = config.pretrain.steps + config.sft.steps + config.rl.steps
    plain = [
        "pretrain.similar_weight=0",
        f"pretrain.steps={total}",
        "sft.steps=0",
        "rl.steps=0",
        "evaluation.steps=[0]",
    ]
    if question == "stages":
        return {"slow": [], "plain": plain}
    if question == "ids":
        return {"plain": plain, "text": [*plain, "tokenizer.source=text"]}
    if question == "converged":
        return {"plain": plain}
    if question == "codes":
        return {"coarse": [*plain, "tokenizer.rqvae.codes=64"]}
    if question == "longer":
        return {"longer": [*plain, f"pretrain.steps={2 * total}", "model.dropout=0.2", "pretrain.label_smoothing=0.1"]}
    causal = [*plain, "model.attention=causal-by-item"]
    return {"plain": plain, "causal": causal, "packed": [*causal, "model.age_bias=true", "model.end_token=false"]}


def answer(parser: argparse.ArgumentParser, options: argparse.Namespace, command: str) -> int:
    """Trains what is missing, writes the result, prints the table."""
    config = load_config(options.config, options.set)
    wanted = variants_of(options.question, config)
    if options.only and options.only not in wanted:
        parser.error(f"--only takes one of {', '.join(wanted)}")
    rows = []
    for variant in [options.only] if options.only else wanted:
        rows += variant_rows(variant, options, options.work / variant, wanted[variant])
    print(table(rows, [*COLUMNS, *(GAINS if options.question == "converged" else [])]))
    if not options.only:
        minutes = sum(json.loads((options.work / variant / "arm.json").read_text())["minutes"] for variant in wanted)
        validation = [
            {"model": variant, **row}
            for variant in wanted
            for row in json.loads((options.work / variant / "curve.json").read_text())
        ]
        record(options.out, command, [config.seed], rows, minutes=minutes, data=options.data.resolve().name,
               protocol=PROTOCOL, validation=validation, **code_of(options.work, wanted))  # fmt: skip
    return 0


def variant_rows(variant: str, options: argparse.Namespace, folder: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """Trains a variant and measures each of its stages; rows are kept in the variant's folder as they come."""
    file = folder / "rows.json"
    if file.exists():
        kept: list[dict[str, Any]] = json.loads(file.read_text())
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    code, started = commit(), time.perf_counter()
    work, data = trained(options, folder, overrides)
    rows = []
    found = measured(variant, work, folder, data)
    if options.question == "converged":
        found = measured_converged(work, folder, data)
    for row in found:
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    minutes = round((time.perf_counter() - started) / 60, 1)
    (folder / "curve.json").write_text(json.dumps(list(converged.curve(work, folder))))
    (folder / "arm.json").write_text(json.dumps({"minutes": minutes, **code}))
    file.write_text(json.dumps(rows))
    return rows


def trained(options: argparse.Namespace, folder: Path, overrides: list[str]) -> tuple[Workspace, Dataset]:
    """Trains what is missing of a variant. Its weights are not loaded yet."""
    config = load_config(options.config, [*options.set, *SEEN_PERMITTED, *overrides])
    share_cache(folder)
    run(options.data, folder / "bundle", config, until="rl", work_folder=folder, device=options.device)
    data = read_data(options.data)
    given = read_given_ids(options.data, config, data.items)
    return tokenize(data, split_by(data, config.split), given, folder, config, options.device), data


def converged_network(options: argparse.Namespace) -> tuple[Workspace, Dataset, Path]:
    """The network of the question `converged`, with its best weights, its data, and its folder."""
    ((variant, overrides),) = variants_of("converged", load_config(options.config, options.set)).items()
    folder = options.work / variant
    work, data = trained(options, folder, overrides)
    load_checkpoint(folder / "pretrain.best.safetensors", work.network, None)
    return work, data, folder


def measured(variant: str, work: Workspace, folder: Path, data: Dataset) -> Iterator[dict[str, Any]]:
    """Test rows of every trained stage: the beam alone, and joined with the dense score where the state was trained."""
    spent = 0.0
    for stage in ("pretrain", "sft", "rl"):
        config = getattr(work.config, stage)
        if config.steps == 0:
            continue
        load_checkpoint(folder / f"{stage}.best.safetensors", work.network, None)
        spent += read_meta(folder / f"{stage}.latest.safetensors")["seconds"] / 60
        label = f"{variant}: {stage}" if variant == "slow" else variant
        for steps in work.config.evaluation.steps:
            yield from test_rows(work, label, replace(work.settings, default_steps=steps), spent)
    if work.config.sft.steps:
        memory = None
        if work.config.neighbours.enabled:
            memory = fit_memory(data.items, work.split, work.config, folder / "cache")
            work.neighbours = memory.whole
        yield from test_rows(work, "slow: deployed", choose(work, memory).settings, spent)


def measured_converged(work: Workspace, folder: Path, data: Dataset) -> Iterator[dict[str, Any]]:
    """Test rows of a plain network alone, and joined with the item memory."""
    load_checkpoint(folder / "pretrain.best.safetensors", work.network, None)
    minutes = read_meta(folder / "pretrain.latest.safetensors")["seconds"] / 60
    return converged.rows(work, data, folder / "cache", minutes)


def test_rows(work: Workspace, label: str, settings: BundleSettings, minutes: float) -> Iterator[dict[str, Any]]:
    """The test's two rows of one model with its default steps and weights, with and without seen items excluded."""
    ranker = replace(work.ranker(), settings=settings)
    for excluded in (False, True):
        row, _ = measure(
            ranker, work.split.test_history, work.split.test_target, settings.default_steps, BEAM, exclude_seen=excluded
        )
        yield {"model": label, **row, "minutes": round(minutes, 1)}


def code_of(work: Path, wanted: dict[str, list[str]]) -> dict[str, Any]:
    """The commit that trained and measured; where variants ran at different ones, each is named."""
    found = {variant: json.loads((work / variant / "arm.json").read_text()) for variant in wanted}
    first = next(iter(found.values()))
    same = all(variant["commit"] == first["commit"] for variant in found.values())
    head = {"commit": first["commit"], "dirty": any(variant["dirty"] for variant in found.values())}
    return head if same else head | {"commits": {variant: values["commit"] for variant, values in found.items()}}
