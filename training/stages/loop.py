"""The loop every stage runs in: optimiser, learning rate, checkpoints that resume exactly, log, the best weights kept.

All that is random at a step follows from (seed, stage, step), so a checkpoint needs no random state, and a run that was
killed anywhere ends, on a CPU, with the weights of an uninterrupted one. Checkpoints are safetensors and do not depend
on the number of processes (`training.stages.distributed`), so another number of them may resume.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

from serving.files import atomic_write
from training.config import StageConfig
from training.preflight import start_afresh
from training.stages.distributed import SINGLE_PROCESS, BatchShard, Process, Terms

# (step, shard of its batch) -> the shard's part of the loss to minimise and of the terms to log
Step = Callable[[int, BatchShard], tuple[torch.Tensor, Terms]]
Evaluate = Callable[[], dict[str, Any]]  # metrics, of which "score" is the one to be best at


LOG_EVERY = 50  # steps
UNCHECKED_STEPS = 200  # a trial run of a few steps has learnt nothing yet, and ends as it may


class Log:
    """A line per event: JSON in log.jsonl, the same to TensorBoard, a short one on the screen. Only rank 0 logs."""

    def __init__(self, folder: Path, silent: bool = False) -> None:
        self.silent = silent
        if silent:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "log.jsonl").open("a", encoding="utf-8")
        self.board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, stage: str, step: int, values: dict[str, Any], show: bool) -> None:
        if self.silent:
            return
        self.file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(f"{stage}/{name}", value, step)
        if show:
            text = "  ".join(
                f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
                for name, value in values.items()
            )
            tqdm.write(f"[{stage} {step}] {text}")

    def close(self) -> None:
        if not self.silent:
            self.file.close()
            self.board.close()


class CheckpointMeta(TypedDict):
    """How far a stage's latest checkpoint is, and the best evaluation until then."""

    step: int
    seconds: float
    best: dict[str, Any]
    best_step: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a stage ended with: the best evaluation, its step, and the seconds spent, resumed runs included."""

    best: dict[str, Any]
    best_step: int
    seconds: float


def run_stage(
    stage: str,
    network: nn.Module,
    config: StageConfig,
    seed: int,
    folder: Path,
    step: Step,
    evaluate: Evaluate | None,
    log: Log,
    process: Process = SINGLE_PROCESS,
    precision: str = "float32",
    check: Callable[[dict[str, Any]], None] | None = None,
    kept: nn.Module | None = None,
    start_competes: bool = True,
) -> Outcome:
    """Trains `network` in place for config.steps, or until validation has stopped rising (`config.patience`), and
    leaves the weights in it that were best on validation; the last ones where `evaluate` is None, because no validation
    is left.

    check: called with every evaluation after the warm-up and UNCHECKED_STEPS; it raises where going on is no use. kept:
    what the step holds from one step to the next, saved and read back with the checkpoints.

    The weights the stage starts with compete too, so that a stage cannot make the model worse on validation; unless
    `start_competes` is false, because some of what is measured means nothing before training. A finished
    stage is read back from `folder`; an unfinished one goes on from its newest checkpoint. All processes evaluate,
    which takes no longer than waiting for one of them; rank 0 alone writes. Between the steps that log, evaluate or
    save, no value is read from the device, so that a GPU never waits for the next step to be prepared.
    """
    latest, best_file = folder / f"{stage}.latest.safetensors", folder / f"{stage}.best.safetensors"
    fused = process.device.type == "cuda"
    optimiser = torch.optim.AdamW(_groups(network, config.weight_decay), lr=config.lr, betas=(0.9, 0.98), fused=fused)
    autocast = torch.autocast(process.device.type, torch.bfloat16, enabled=precision == "bfloat16")
    done, seconds, best, best_step = 0, 0.0, {}, 0

    def save(path: Path, optimiser: torch.optim.Optimizer | None, meta: dict[str, Any]) -> None:
        if process.is_first:
            save_checkpoint(path, network, optimiser, meta, kept if optimiser is not None else None)

    started_before = latest.exists()
    process.wait()  # no process may write it before all have looked
    if started_before:
        meta = load_checkpoint(latest, network, optimiser, kept)
        done, seconds, best, best_step = meta["step"], meta["seconds"], meta["best"], meta["best_step"]
    else:
        if evaluate is not None:
            best = evaluate()
            log.write(stage, 0, best, show=True)
            save(best_file, None, {})
        save(latest, optimiser, {"step": 0, "seconds": 0.0, "best": best, "best_step": 0})
    started = time.perf_counter()
    finite = torch.ones((), dtype=torch.bool, device=process.device)  # whether all gradients were
    with tqdm(total=config.steps, initial=done, desc=stage, unit="step", smoothing=0.05, mininterval=1.0,
              disable=not process.is_first) as bar:  # fmt: skip
        for number in range(done, config.steps):
            if ended_early(done, best_step, config):
                break
            network.train()
            for group in optimiser.param_groups:
                group["lr"] = config.lr * learning_rate_factor(number, config)
            optimiser.zero_grad(set_to_none=True)
            sums: Terms = {}
            for part in range(config.accumulate):
                shard = process.shard(part, config.accumulate, f"{seed}/{stage}/{number}")
                with autocast:
                    loss, terms = step(number, shard)
                torch.autograd.backward(loss)
                for name, value in ({"loss": loss.detach()} | terms).items():
                    sums[name] = sums[name] + value if name in sums else value
            process.sum_gradients(network)
            norm = nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
            finite &= norm.isfinite()
            optimiser.step()
            done = number + 1
            bar.update()
            logs, saves = (done == config.steps or done % every == 0 for every in (LOG_EVERY, config.checkpoint_every))
            evaluates = done == config.steps or (config.eval_every and done % config.eval_every == 0)
            if (logs or saves or evaluates) and not finite:
                section = stage.partition("-")[0]  # of the settings: the trial of a stage has those of the stage
                raise FloatingPointError(
                    f"Stage {stage} diverged by step {number}; run with a lower {section}.lr, and for that "
                    f"{start_afresh(folder)}"
                )
            if logs:
                values = process.sum_terms(sums)
                log.write(stage, done, {**values, "grad_norm": float(norm)}, show=False)
                bar.set_postfix(loss=f"{values['loss']:.3f}")
            if evaluates and evaluate is not None:
                metrics = evaluate()
                log.write(stage, done, metrics, show=True)
                if check is not None and done > max(config.warmup, UNCHECKED_STEPS):
                    check(metrics)
                no_rival = best_step == 0 and not start_competes
                if metrics["score"] > best["score"] or no_rival:
                    best, best_step = metrics, done
                    save(best_file, None, {})
            if ended_early(done, best_step, config):
                saves = True
                log.write(stage, done, {"ended": f"no better evaluation since step {best_step}"}, show=True)
            if saves:
                spent = seconds + time.perf_counter() - started
                meta = {"step": done, "seconds": spent, "best": best, "best_step": best_step}
                save(latest, optimiser, meta)
    process.wait()  # for what rank 0 writes
    if config.steps:
        seconds = read_meta(latest)["seconds"]
    load_checkpoint(latest if evaluate is None else best_file, network, None)
    network.eval()
    return Outcome(best, best_step, seconds)


def ended_early(done: int, best_step: int, config: StageConfig) -> bool:
    """Whether the last `config.patience` evaluations up to step `done` were all no better than an earlier one."""
    if not config.patience or not config.eval_every:
        return False
    return done // config.eval_every - best_step // config.eval_every >= config.patience


def learning_rate_factor(step: int, config: StageConfig) -> float:
    """Linear warm-up, then a cosine from 1 down to 0.1."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, progress))


def save_checkpoint(
    path: Path,
    network: nn.Module,
    optimiser: torch.optim.Optimizer | None,
    meta: dict[str, Any],
    kept: nn.Module | None = None,
) -> None:
    """Writes weights, optimiser and meta as one file, atomically. Raises StorageError, say for a full disk."""
    tensors = {f"weights/{name}": value.contiguous() for name, value in network.state_dict().items()}
    if kept is not None:
        tensors |= {f"kept/{name}": value.contiguous() for name, value in kept.state_dict().items()}
    if optimiser is not None:
        for number, parameter in enumerate(_parameters(optimiser)):
            for name, value in optimiser.state[parameter].items():
                tensors[f"optimiser/{number}/{name}"] = value.contiguous()
    with atomic_write(path) as partial:
        partial.write_bytes(save(tensors, {"meta": json.dumps(meta)}))


def load_checkpoint(
    path: Path, network: nn.Module, optimiser: torch.optim.Optimizer | None, kept: nn.Module | None = None
) -> dict[str, Any]:
    """Loads a checkpoint into network, optimiser and what the step keeps, and returns its meta."""
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
        for module, prefix in ((network, "weights/"), (kept, "kept/")):
            if module is not None:
                module.load_state_dict(
                    {k.removeprefix(prefix): file.get_tensor(k) for k in keys if k.startswith(prefix)}
                )
        if optimiser is not None:
            for number, parameter in enumerate(_parameters(optimiser)):
                start = f"optimiser/{number}/"
                state = {
                    k.removeprefix(start): file.get_tensor(k).to(parameter.device) for k in keys if k.startswith(start)
                }
                if state:
                    optimiser.state[parameter] = state
        meta: dict[str, Any] = json.loads((file.metadata() or {}).get("meta", "{}"))
        return meta


def read_meta(path: Path) -> CheckpointMeta:
    """The meta of a stage's latest checkpoint."""
    with safe_open(path, framework="pt") as file:
        meta: CheckpointMeta = json.loads((file.metadata() or {})["meta"])
        return meta


def _parameters(optimiser: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def _groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only, not on embeddings, norms and biases."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        plain = parameter.dim() < 2 or "shared" in name or "bias" in name
        (free if plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
