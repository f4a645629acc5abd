"""From trained weights to a bundle: validation chooses the defaults, accuracy is measured, the bundle written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from serving import sample
from serving.bundle import Bundle
from serving.bundle_writer import write_bundle
from serving.engine import Engine
from serving.errors import BundleError
from serving.items.catalogue import Catalogue
from serving.items.fields import Fields
from serving.items.histories import history_tokens
from serving.steps import worthwhile_steps
from serving.types import BundleSettings
from training.data.prepare import learnt_until, sample_events, sample_users
from training.data.read import Dataset
from training.evaluate import Ranks, compare, measure
from training.int8_gate import int8_gate
from training.join import CrossFittedRanker, fit_join
from training.memory import FittedMemory, fit_memory, make_memory
from training.metrics import ndcg, paired_gain, target_ranks
from training.model_card import model_card
from training.refit import refit
from training.workspace import Workspace


def export(
    work: Workspace,
    data: Dataset,
    work_folder: Path,
    bundle_folder: Path,
    stages: dict[str, Any],
    earlier: Bundle | None = None,
) -> str:
    """Writes the bundle and returns its version. Validation NDCG@10 chooses the item memory, how it joins the network,
    and the defaults (`choose`); then the model may learn from the events of validation (`refit`). earlier: the bundle
    that this one is an update of, with the same items: the new one keeps its popularity and named subsets and blends in
    its memory, and its accuracy stands beside (`compare`, also printed)."""
    memory, recount = None, None
    if work.config.neighbours.enabled:
        kept = earlier.neighbours if earlier else None
        # What semantic IDs are made from is behaviour unless it is text: a brand or categories will do for that.
        is_behaviour = not (earlier or data.items.has_text or work.config.tokenizer.source == "text")
        behaviour = work.embedding if is_behaviour else None
        cache = work_folder / "cache"
        memory = fit_memory(data.items, work.split, work.config, cache, kept, behaviour)
        recount = partial(make_memory, memory.setting, data.items, config=work.config, cache=cache, earlier=kept,
                          behaviour=behaviour)  # fmt: skip
    choice = choose(work, memory)
    work.settings, work.neighbours = choice.settings, memory.whole if memory else None
    refitted, held_out = None, work.split
    if work.config.refit.epochs:
        work, refitted = refit(work, data, recount, work_folder)
        print(json.dumps({"refit": refitted}), flush=True)
    work = work.on("cpu")  # bundles are written from there, and 8-bit weights run there
    of_users = {"of": len(work.split.valid_target), "split": "valid"}
    accuracy = [row | of_users for row in choice.accuracy]
    bundle = Bundle(work.config.name, "", work.vocabulary, work.settings, work.network, catalogue(work, data, earlier),
                    accuracy)  # fmt: skip
    bundle.neighbours = work.neighbours
    bundle.int8 = int8_gate(work)
    users, _ = sample_users(work.split.valid_history, work.split.valid_target, sample.SIZE)
    engine = Engine(bundle, threads=torch.get_num_threads())
    bundle.sample = sample.record_sample(engine, [history.tolist() for history in users])
    bundle.about = {
        "seed": work.config.seed,
        "data": data.name,
        "stages": stages,
        "config": work.config.to_json(),
        "choices": choice.table,
        "neighbours": memory.report | {"join": choice.join} if memory else None,
        "refit": refitted,
        "learnt_until": learnt_until(data, held_out, work.config.split, bool(refitted and refitted["kept"]),
                                     earlier.about.get("learnt_until") if earlier else None),
    }  # fmt: skip

    compared = compare(work, earlier) if earlier else []
    for row in compared:
        print(json.dumps(row), flush=True)
    if earlier:
        bundle.about["update"] = {"of": earlier.version, "measured": compared}

    def write_tokenizer(folder: Path) -> None:
        for file in (work_folder / "tokenizer").iterdir():
            shutil.copyfile(file, folder / file.name)

    card = model_card(work, data, accuracy, stages, bundle.int8, compared, refitted)
    version = write_bundle(bundle_folder, bundle, model_card=card, write_tokenizer=write_tokenizer)
    verify(bundle_folder)
    return version


@torch.no_grad()
def verify(bundle_folder: Path) -> None:
    """Opens the bundle with transformers, as anyone can, and compares. Raises BundleError if the logits differ."""
    from transformers import T5ForConditionalGeneration  # seconds to import, and only needed here

    bundle = Bundle.load(bundle_folder)
    settings = bundle.settings
    if settings.attention != "bidirectional" or settings.age_bias or settings.time_bias or settings.item_input:
        return  # transformers has none of these; the model card says how to build mask, bias and input
    t5 = bundle.network.t5
    tokens, mask = history_tokens(
        [tuple(range(min(3, len(bundle.catalogue))))],
        bundle.catalogue.tokens,
        bundle.max_items,
        bundle.settings.suffix_tokens,
    )
    inputs = torch.tensor([[bundle.vocabulary.start_tokens[0], *bundle.catalogue.tokens[0, :-1].tolist()]])
    at = torch.arange(inputs.shape[1])
    bias = t5.decoder.position_bias(at, at).masked_fill(at[None, :] > at[:, None], float("-inf"))
    per_item = bundle.catalogue.tokens.shape[1]
    cross = bundle.network.cross_keys_values(
        bundle.network.encode(tokens, mask, "bidirectional", per_item), mask, per_item
    )
    ours = t5.logits(t5.decode(t5.shared(inputs), bias.unsqueeze(0), cross, None)[0])
    theirs: Any = T5ForConditionalGeneration.from_pretrained(bundle_folder / "model")
    expected = theirs.eval()(input_ids=tokens, attention_mask=mask.long(), decoder_input_ids=inputs).logits
    if not torch.allclose(ours, expected, atol=1e-3, rtol=1e-3):
        raise BundleError("transformers computes other logits from the bundle than streamrec; report this as a bug.")


@dataclass(frozen=True, slots=True)
class Choice:
    """The settings with the best validation NDCG@10, and `table`: a row per combination tried.

    accuracy: the row of every number of steps under these settings, with its gain over 0 steps (`paired_gain`). join:
    how the memory's join was chosen; None without a memory.
    """

    settings: BundleSettings
    table: list[dict[str, Any]]
    accuracy: list[dict[str, Any]]
    join: dict[str, Any] | None = None


def choose(work: Workspace, memory: FittedMemory | None = None, steps: Sequence[int] | None = None) -> Choice:
    """Chooses settings by validation NDCG@10. steps: the numbers of steps tried, 0 first; None: all that it can take.

    First, without steps and dense score: how the item memory joins (`training/join.py`); where it does, everything that
    follows is measured with a memory and a gate that the measured users did not choose. Then, for every number of
    steps, the dense weight, and without a memory how many of the dense score's best items join the beam's. The weight
    kept is that of the most steps worth their time (`serving/steps.py`), when each number of steps has its best one;
    the default number is the same of what is measured under the weight that was kept, for that is what is served.
    """
    evaluation = work.config.evaluation
    histories, target = sample_users(work.split.valid_history, work.split.valid_target, evaluation.choice_users)
    events = sample_events(work.split.valid_events, evaluation.choice_users)
    ranker, join = work.ranker(), None
    if memory is not None:
        join = fit_join(
            ranker, memory, histories, target, evaluation.beam, work.config.neighbours.candidates,
            exclude_seen=evaluation.exclude_seen, events=events,
        )  # fmt: skip
    table: list[dict[str, Any]] = []
    seen: dict[BundleSettings, tuple[dict[str, Any], np.ndarray]] = {}

    def mean_ndcg(settings: BundleSettings) -> float:
        if settings not in seen:
            candidate: Ranks = replace(ranker, settings=settings)
            if join is not None and settings.neighbours_weight:
                candidate = CrossFittedRanker(replace(ranker, settings=settings), join)
            row, ranked = measure(
                candidate, histories, target, settings.default_steps, evaluation.beam,
                exclude_seen=evaluation.exclude_seen, events=events,
            )  # fmt: skip
            table.append(row)
            seen[settings] = row, ndcg(target_ranks(ranked, target))
        return float(seen[settings][0]["ndcg@10"])

    def best_of(candidates: list[BundleSettings], desc: str) -> BundleSettings:
        for settings in tqdm(candidates, desc=desc, unit="setting", mininterval=1.0):
            mean_ndcg(settings)
        return max(candidates, key=mean_ndcg)  # the first of equals

    start = work.settings if join is None else join.settings
    lengths = range(work.vocabulary.max_steps + 1) if steps is None else steps
    counts = evaluation.dense_candidates if join is None else (start.dense_candidates,)

    def candidates(steps: int) -> list[BundleSettings]:
        return [
            replace(start, default_steps=steps, dense_weight=weight, dense_candidates=count)
            for weight in evaluation.dense_weights
            for count in (counts if weight else counts[:1])  # without a weight there is nothing to be a candidate by
        ]

    def with_gains(compared: Iterable[BundleSettings]) -> list[dict[str, Any]]:
        """Their rows, all but the first with the gain over the first."""
        (first, without), *others = (seen[settings] for settings in compared)
        return [first, *(row | paired_gain(own, without) for row, own in others)]

    best = {steps: best_of(candidates(steps), f"choose, {steps} steps") for steps in lengths}
    chosen = best[worthwhile_steps(with_gains(best.values()), max(lengths))[-1]]
    accuracy = with_gains(replace(chosen, default_steps=steps) for steps in lengths)
    settings = replace(chosen, default_steps=worthwhile_steps(accuracy, max(lengths))[-1])
    return Choice(settings, table, accuracy, join.report if join else None)


def catalogue(work: Workspace, data: Dataset, earlier: Bundle | None = None) -> Catalogue:
    """The data's items with their tokens; popularity counts training events only, with those of an earlier bundle."""
    seen = np.bincount(
        np.concatenate([*work.split.train, np.empty(0, np.int32)]).astype(np.int64), minlength=len(data.items)
    )
    items = data.items
    fields = Fields()
    fields.reserve(len(items))
    for row, known in items.fields.items():
        fields.put(row, known)
    return Catalogue(
        item_ids=items.item_ids,
        tokens=work.item_tokens_np.astype(np.int32),
        titles=items.titles,
        categories=items.categories,
        popularity=seen + (earlier.catalogue.popularity if earlier else 0.0),
        subsets=dict(earlier.catalogue.subsets) if earlier else {},
        fields=fields,
        filters=dict(earlier.catalogue.filters) if earlier else {},
    )
