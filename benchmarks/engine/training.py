"""How fast one process trains, compared with a plain transformers loop: same T5, same data, examples a second.

    OMP_NUM_THREADS=1 python -m benchmarks.engine.training
    OMP_NUM_THREADS=1 python -m benchmarks.engine.training --data DIR
    python -m benchmarks.engine.training --device cuda --users 10000 --batch 1024

The plain loop is the obvious one: T5ForConditionalGeneration, a shuffled DataLoader that pads to the longest history of
the batch, one call per sequence, AdamW; on a GPU bfloat16 by autocast, as in ours. Ours is
`training.stages.loop.run_stage`, checkpoints included: `rows` with an encoder pass per history, like the plain loop;
`packed` with one for all prefixes of a sequence, by an encoder that is causal over items; on a CPU also `bfloat16`, the
same in that precision, which pays where the processor multiplies in it (AVX512-BF16, AMX). There are two tasks: `plain`
trains the next item (as TIGER), `stage 1` also items similar to it, which takes the plain loop a second call that reads
the history again. Contenders take turns; a round is an epoch, and the fastest counts, by the processor's time on a CPU.
`ratio` compares with the plain loop on the same task, `to_rows` with ours row by row. All have a softmax over the whole
vocabulary; over a block, a run's default, ours is faster still.

Without --data: a generated shop. --data: --users of a data folder's, drawn at random.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import T5Config, T5ForConditionalGeneration

from benchmarks.common import ROOT, Run, argument_parser, result_file, table
from serving.items.histories import history_tokens
from training.config import ModelSettings, PretrainConfig, RunConfig
from training.data.examples import Rows, epoch_batches
from training.data.prepare import split_by
from training.data.read import read_data
from training.data.shop import write_shop
from training.ids.semantic_ids import random_ids
from training.stages.distributed import WHOLE_BATCH, Process
from training.stages.loop import Log, run_stage
from training.stages.pretrain import SIMILAR_START, PretrainStep
from training.workspace import Workspace, make_workspace

COLUMNS = ["task", "contender", "examples", "seconds", "examples_per_second", "ratio", "to_rows"]
PLAIN_LOOP, ROWS, PACKED, BFLOAT16 = "transformers", "rows", "packed", "bfloat16"
TASKS = {"plain": 0.0, "stage 1": 0.5}  # task -> weight of the similar items


def main() -> None:
    parser = argument_parser("benchmarks.engine.training", __doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--users", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=PretrainConfig().batch_size)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=result_file, help="JSON file (benchmarks/results/training[-DATA|-cuda].json)")
    options = parser.parse_args()
    run = Run(parser, options)
    with tempfile.TemporaryDirectory() as folder:
        forms = workspaces(options.data, Path(folder), options.users, options.device)
        rows = [row for task in TASKS for row in measure(forms, task, options.rounds, Path(folder), options.batch)]
    print(table(rows, COLUMNS))
    work = forms[PACKED]
    model = work.config.model
    of_data = f"-{options.data.resolve().name}" if options.data else ""
    name = f"training{of_data}" + ("-cuda" if options.device == "cuda" else "")
    run.record(
        options.out or ROOT / f"benchmarks/results/{name}.json",
        [0],
        rows,
        batch_size=options.batch,
        precision=work.config.precision,
        parameters=sum(p.numel() for p in work.network.t5.parameters()),
        history={"mean": round(float(work.examples.shapes.mean()), 2), "most": model.max_items},
        model={"d_model": model.d_model, "layers": model.layers, "max_items": model.max_items},
    )


def workspaces(data_folder: Path | None, folder: Path, users: int, device: str = "cpu") -> dict[str, Workspace]:
    """The default model and its packed forms on the same examples, with random semantic IDs of three tokens."""
    if data_folder is None:
        data_folder = folder / "shop"
        write_shop(data_folder, users=users, items=500, seed=0)
    data = read_data(data_folder)
    ids = random_ids(len(data.items), (64, 64, 64))
    embedding = np.random.default_rng(0).standard_normal((len(data.items), 16)).astype(np.float32)
    split = split_by(data, "leave-one-out")
    drawn = np.random.default_rng(0).permutation(len(split.train))[:users]
    split = replace(split, train=[split.train[user] for user in np.sort(drawn)])
    precision: Any = "float32" if device == "cpu" else "bfloat16"
    packed = ModelSettings(normalise="vocabulary", attention="causal-by-item", age_bias=True, end_token=False)
    configs = {
        ROWS: RunConfig(precision=precision, model=ModelSettings(normalise="vocabulary")),
        PACKED: RunConfig(precision=precision, model=packed),
    }
    if device == "cpu":
        configs[BFLOAT16] = RunConfig(precision="bfloat16", model=packed)
    return {
        name: make_workspace(config, split, ids.codes, ids.codebook_sizes, embedding, device)
        for name, config in configs.items()
    }


def measure(
    forms: dict[str, Workspace], task: str, rounds: int, folder: Path, batch: int = 256
) -> list[dict[str, Any]]:
    examples = len(forms[ROWS].examples)
    clock = time.process_time if forms[ROWS].device.type == "cpu" else time.perf_counter

    def config(rows: Rows) -> PretrainConfig:
        steps = len(epoch_batches(rows, batch, seed=0, epoch=0))
        return PretrainConfig(
            steps=steps,
            similar_weight=TASKS[task],
            label_smoothing=0.0,
            batch_size=batch,
            eval_every=0,
            checkpoint_every=steps,
        )

    contenders: dict[str, Callable[[int], None]] = {
        PLAIN_LOOP: lambda _: theirs(forms[ROWS], config(forms[ROWS].examples)),
        **{
            name: lambda turn, name=name, work=work: ours(  # type: ignore[misc]
                work, config(work.windows or work.examples), folder / f"{task}-{name}-{turn}"
            )
            for name, work in forms.items()
        },
    }
    best = dict.fromkeys(contenders, float("inf"))
    for turn in range(rounds):
        for name, run in contenders.items():
            begin = clock()
            run(turn)
            best[name] = min(best[name], clock() - begin)
    return [
        {
            "task": task,
            "contender": name,
            "examples": examples,
            "seconds": round(seconds, 2),
            "examples_per_second": round(examples / seconds, 1),
            "ratio": round(best[PLAIN_LOOP] / seconds, 2),
            "to_rows": round(best[ROWS] / seconds, 2),
        }
        for name, seconds in best.items()
    ]


def ours(work: Workspace, config: PretrainConfig, folder: Path) -> None:
    """A stage of one epoch; nothing is evaluated."""
    with closing(Log(folder, silent=True)) as log:
        run_stage("pretrain", work.network, config, 0, folder, PretrainStep(work, config), lambda: {"score": 0.0}, log,
                  Process(device=work.device), work.config.precision)  # fmt: skip


def theirs(work: Workspace, config: PretrainConfig) -> None:
    """An epoch of the plain loop."""
    model: Any = transformers_twin(work)
    model.to(work.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    step = PretrainStep(work, config)  # draws the similar items

    def collate(index: list[int]) -> dict[str, Any]:
        rows = np.asarray(index)
        histories = work.examples.histories(rows)
        tokens, mask = history_tokens(histories, work.item_tokens_np, work.settings.max_items, work.suffix)
        return {"input_ids": tokens, "attention_mask": mask.long(), "item": work.examples.targets(rows)}

    generator = torch.Generator().manual_seed(0)
    everything: Any = range(len(work.examples))
    model.train()
    for batch in DataLoader(everything, config.batch_size, shuffle=True, collate_fn=collate, generator=generator):
        with torch.autocast(work.device.type, torch.bfloat16, enabled=work.config.precision == "bfloat16"):
            loss = transformers_loss(work, config, model, step, batch)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimiser.step()


def transformers_twin(work: Workspace) -> T5ForConditionalGeneration:
    """transformers' T5 with our weights."""
    model = T5ForConditionalGeneration(T5Config(**work.network.t5.config.to_transformers()))
    missing, unexpected = model.load_state_dict(work.network.t5.state_dict(), strict=False)
    assert not unexpected and all("embed_tokens" in name or "lm_head" in name for name in missing)  # they are tied
    return model


def transformers_loss(
    work: Workspace,
    config: PretrainConfig,
    model: T5ForConditionalGeneration,
    step: PretrainStep,
    batch: dict[str, Any],
) -> torch.Tensor:
    """The loss of stage 1, one call of the model per term: NLL of the item, and of similar items before the item."""
    inputs = {name: batch[name].to(work.device) for name in ("input_ids", "attention_mask")}
    target = work.item_tokens[batch["item"]]
    sequences = [(config.plain_weight, work.vocabulary.start_tokens[0], target)]
    if config.similar_weight:
        similar = step.similar(batch["item"][:, None], WHOLE_BATCH)[:, 0]
        sequences.append((config.similar_weight, SIMILAR_START, torch.cat([similar, target], 1)))
    loss = torch.zeros(())
    for weight, start_token, sequence in sequences:
        start = torch.full((len(sequence), 1), start_token, device=work.device)
        decoder_input_ids = torch.cat([start, sequence[:, :-1]], 1)
        mean = model(**inputs, decoder_input_ids=decoder_input_ids, labels=sequence).loss
        loss = loss + weight * sequence.shape[1] * mean  # a mean over tokens; ours is a sum over them
    return loss


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
