"""Trains the next version of a bundle: items keep their tokens, and training goes on from its weights.

Items come first, exactly as a service takes them in (`serving/online/live_catalogue.py`): those of its log of changes
keep the semantic IDs that they were given there, and new ones of the data get the nearest that are free, by the
bundle's own embedder and codebooks. The network goes on from the bundle's weights, in the last stage that taught it
from targets; only an item that is new needs a row of its own, which begins at zero, as it has been served. The item
memory is fitted to the new data and blended with the bundle's own, as far as validation prefers that; its join and the
defaults are chosen anew, as in any export.
"""

from __future__ import annotations

import asyncio
import copy
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serving.bundle import Bundle
from serving.engine import Engine
from serving.errors import ServingError, StoreError, StoreUnavailable
from serving.files import atomic_write, locked_folder
from serving.items.catalogue import Catalogue
from serving.items.tokenizer import item_text
from serving.network.model import StreamRec
from serving.online.catalogues import KIND
from serving.online.changelog import CHANGES_FILE, Entry, FileLog, RedisLog, encoded, read_to_end, stream_key
from serving.online.live_catalogue import LiveCatalogue
from serving.online.redis_link import RedisLink, connect
from serving.types import REDIS_PREFIX
from training.config import RunConfig
from training.config_file import override_config, read_stored_config
from training.data.feedback import data_folder_of
from training.data.prepare import Split, split_by, weigh, without_learnt
from training.data.read import Items, data_files, read_data, read_items
from training.pipeline import TRAINED, begin_run, check_start, fingerprint, train, write_version
from training.preflight import LEAST_JUDGES, RunError, check_data, check_room
from training.refit import TRIAL
from training.stages.distributed import join_processes
from training.workspace import Workspace, workspace_of

# Of the stage that goes on. What it does harm to is not kept: the weights it begins with compete on validation.
STAGE = {"steps": 300, "lr": 1e-3, "warmup": 30, "eval_every": 100}
REDIS_LIMIT_S = 10.0


def update(
    folder: Path,
    source: Path | str,
    out: Path,
    overrides: Sequence[str] = (),
    changes: str | None = None,
    redis_prefix: str = REDIS_PREFIX,
    device: str = "cpu",
) -> None:
    """Makes `out`, the next version of the bundle in `folder`, and resumes like `run`.

    source: a data folder, or a service's feedback. changes: where the service that serves the bundle keeps its log of
    changes, the folder of its state or the address of its Redis. overrides: of `update_config`.
    """
    earlier = Bundle.load(folder)
    config = update_config(earlier, overrides)
    out, work_folder = check_start(out, None, device)
    with ExitStack() as stack:
        process = stack.enter_context(join_processes(device))
        with process.first_goes_ahead():
            if process.is_first:
                stack.enter_context(locked_folder(work_folder))
            data_folder = data_folder_of(source, work_folder)
            _, items_file = data_files(data_folder)
            entries = logged_changes(changes, redis_prefix, work_folder / CHANGES_FILE) if changes else []
            extended = extend(earlier, entries, read_items(items_file) if items_file else None)
            data = read_data(data_folder, extended.items)
            weights = config.history.type_weights.items()  # the newest events may lack some types
            data = weigh(data, {name: weight for name, weight in weights if name in data.type_names})
            every = split_by(data, config.split, times=config.model.time_bias)
            split = without_learnt(data, every, earlier.about.get("learnt_until"))
            judges = len(split.valid_target)
            if judges < LEAST_JUDGES <= len(every.valid_target):
                raise RunError(
                    f"The bundle {earlier.name} has learnt what it was validated on, and {judges} users of {data.name} "
                    "have two newer events, which an update is judged by; add newer events, or train anew."
                )
            check_data(data, split, reads_times=config.model.time_bias, refits=config.refit.epochs > 0, compares=True)
            if process.is_first:
                wanted = {"data": fingerprint(data_folder), "config": config.to_json(), "earlier": earlier.version}
                begin_run(work_folder, wanted, data, split)
                print(extended.notes)
                if left_out := len(every.valid_target) - judges:
                    print(f"  note: {left_out:,} validation targets left out: the earlier bundle may have learnt them")
                shutil.copytree(folder / "tokenizer", work_folder / "tokenizer", dirs_exist_ok=True)
        work = continued(extended.bundle, config, split, process.device)
        stages = [stage for stage in TRAINED if work.stage_config(stage).steps]
        check_room(work_folder, work.network, stages, [TRIAL] if config.refit.epochs else [])
        summary = train(stages, work, work_folder, process, continues=True)
        if process.is_first:
            write_version(work, data, work_folder, out, summary, extended.bundle)


def update_config(bundle: Bundle, overrides: Sequence[str]) -> RunConfig:
    """The settings that a bundle was trained with, with STAGE in the last stage that taught it from targets and without
    the others, and the newest event of every user held out; then the overrides. Raises RunError and ConfigError."""
    if "config" not in bundle.about:
        raise RunError(f"The bundle {bundle.name} does not say how it was trained; train it again with this version.")
    stored = read_stored_config(bundle.about["config"])
    data = stored.to_json() | {"name": bundle.name, "split": "leave-one-out", "taught_by": stored.last_supervised}
    for stage in TRAINED:
        data[stage] |= STAGE if stage == stored.last_supervised else {"steps": 0}
    return override_config(data, overrides)


def logged_changes(source: str, redis_prefix: str, snapshot: Path) -> list[dict[str, Any]]:
    """The entries of a service's log of changes, as they were when they were first asked for. Raises StoreError."""
    if not snapshot.exists():
        entries = asyncio.run(_read_log(source, redis_prefix))
        with atomic_write(snapshot) as partial:
            partial.write_bytes(b"".join(encoded(entry) + b"\n" for entry in entries))
    return asyncio.run(read_to_end(FileLog(snapshot)))


async def _read_log(source: str, redis_prefix: str) -> list[dict[str, Any]]:
    if "://" in source:
        try:
            client = connect(source)
        except ValueError as error:  # the address may hold a password
            raise StoreError("--changes is not the address of a Redis; write it as redis://host:6379/0.") from error
        try:
            return await read_to_end(RedisLog(RedisLink(client, REDIS_LIMIT_S), stream_key(redis_prefix)))
        except StoreUnavailable as error:
            raise StoreError("The log of changes in Redis cannot be read; check the address.") from error
        finally:
            await client.aclose()
    path = Path(source) / CHANGES_FILE
    if not path.is_file():
        raise StoreError(f"There is no {path}; name the folder of STREAMREC_STATE_DIR, or the address of the Redis.")
    return await read_to_end(FileLog(path))


@dataclass(frozen=True, slots=True)
class Extended:
    """A bundle that knows more items, served otherwise as before. items: all of them, in the order of its rows.

    left_out: how many items could not get a semantic ID, by the reason.
    """

    bundle: Bundle
    items: Items
    added: int
    left_out: Counter[str]

    @property
    def notes(self) -> str:
        return "\n".join(
            [f"  new items             {self.added:>14,}"]
            + [f"  note: {count:,} items left out: {reason}" for reason, count in self.left_out.items()]
        )


def extend(bundle: Bundle, changes: Sequence[Entry], items: Items | None) -> Extended:
    """The bundle after a service's changes, and with the items of a data folder, put as `PUT /items` puts them."""
    before = len(bundle.catalogue)
    left_out = asyncio.run(_put(bundle, changes, items))
    live = bundle.catalogue
    item_ids, titles, categories = list(live.item_ids), list(live.titles), list(live.categories)
    catalogue = Catalogue(
        item_ids, live.tokens.copy(), titles, categories, live.popularity.copy(), dict(live.subsets),
        fields=live.fields, filters=dict(live.filters),
    )  # fmt: skip
    described = dict(zip(items.item_ids, items.descriptions, strict=True)) if items else {}
    descriptions = [described.get(item_id) for item_id in item_ids]
    fields = {row: live.fields_of(row) for row in range(len(live))}
    brands = [brand if isinstance(brand := known.get("brand"), str) else None for known in fields.values()]
    every = Items(item_ids, titles, brands, categories, descriptions, fields)
    network = with_items(bundle.network, len(catalogue))
    return Extended(replace(bundle, catalogue=catalogue, network=network), every, len(catalogue) - before, left_out)


async def _put(bundle: Bundle, changes: Sequence[Entry], items: Items | None) -> Counter[str]:
    async def at_once(work: Callable[[], Any]) -> Any:
        return work()

    live = LiveCatalogue(Engine(bundle, threads=torch.get_num_threads()), at_once)
    try:
        results: list[Any] = await live.apply([entry for entry in changes if entry.get("kind") == KIND])
        made = await live.put_entries(_entries(items, bundle.catalogue)) if items else []
        results += [each for each in made if isinstance(each, ServingError)]
        results += await live.apply([each for each in made if not isinstance(each, ServingError)])
    finally:
        await live.close()
    return Counter(str(result) for result in results if isinstance(result, Exception))


def _entries(items: Items, catalogue: Catalogue) -> list[Entry]:
    """What puts items. Of one that the catalogue has, whatever a row leaves out stays, as in a list of new prices."""
    entries: list[Entry] = []
    for row, item_id in enumerate(items.item_ids):
        known = catalogue.row(item_id)
        title, brand, categories, description = (
            items.titles[row], items.brands[row], items.categories[row], items.descriptions[row],
        )  # fmt: skip
        fields = items.fields.get(row, {})
        if known is not None:
            if not fields and not item_text(title, brand, categories, description):
                continue
            title, categories = title or catalogue.titles[known], categories or list(catalogue.categories[known])
            fields = catalogue.fields_of(known) | fields
        entries.append({
            "item_id": item_id, "title": title, "brand": brand, "categories": categories,
            "description": description, "fields": fields, "available_from": None, "available_until": None,
        })  # fmt: skip
    return entries


def with_items(network: StreamRec, items: int) -> StreamRec:
    """A copy of the network for more items: one that is new has no vectors of its own yet."""
    width = network.t5.config.d_model
    larger = StreamRec(
        network.t5.config,
        items,
        network.step_form,
        network.ages,
        times=network.times,
        reads_items=network.reads_items,
    )
    weights = dict(network.state_dict())
    for name in ("heads.item_free.weight", "heads.item_input.weight"):
        if name in weights:
            weights[name] = torch.cat([weights[name], torch.zeros(items - len(weights[name]), width)])
    larger.load_state_dict(weights)
    return larger.eval()


@torch.no_grad()
def continued(bundle: Bundle, config: RunConfig, split: Split, device: torch.device | str = "cpu") -> Workspace:
    """The workspace of an update. By what items are similar in stage 1: the network's own vectors of them."""
    network, tokens = copy.deepcopy(bundle.network), bundle.catalogue.tokens
    vectors = network.item_vectors(torch.from_numpy(tokens.astype(np.int64)))
    return workspace_of(config, split, bundle.vocabulary, network, tokens, vectors.numpy(), device)
