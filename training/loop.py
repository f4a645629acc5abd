"""The loop every stage runs in: optimiser, learning rate, checkpoints that resume exactly, log, the best weights kept.

All that is random at a step follows from (seed, stage, step), so a checkpoint needs no random state, and a run that was
killed anywhere ends, on a CPU, with the very weights of an undisturbed one. Checkpoints are safetensors.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

from training.config import StageConfig

# (step) -> loss to minimise and the terms to log; (step) -> metrics, of which "score" is the one to be best at
Step = Callable[[int], tuple[torch.Tensor, dict[str, float]]]
Evaluate = Callable[[], dict[str, Any]]


class StorageError(RuntimeError):
    """The disk does not take a checkpoint; the message says what to do."""


class Log:
    """A line per event: JSON in log.jsonl, the same to TensorBoard, a short one on the screen."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "log.jsonl").open("a", encoding="utf-8")
        self.board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, stage: str, step: int, values: dict[str, Any], show: bool) -> None:
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
        self.file.close()
        self.board.close()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a stage ended with: the best evaluation, where, and the seconds spent (over all its processes)."""

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
    evaluate: Evaluate,
    log: Log,
) -> Outcome:
    """Trains `network` in place for config.steps and leaves the weights in it that validation liked best.

    The weights the stage starts with compete too, so that a stage cannot make the model worse on validation. A finished
    stage is read back from `folder`; a half finished one goes on from its newest checkpoint.
    """
    latest, best_file = folder / f"{stage}.latest.safetensors", folder / f"{stage}.best.safetensors"
    optimiser = torch.optim.AdamW(_groups(network, config.weight_decay), lr=config.lr, betas=(0.9, 0.98))
    done, seconds, best, best_step = 0, 0.0, {}, 0
    if latest.exists():
        meta = load_checkpoint(latest, network, optimiser)
        done, seconds, best, best_step = meta["step"], meta["seconds"], meta["best"], meta["best_step"]
    else:
        best = evaluate()
        log.write(stage, 0, best, show=True)
        save_checkpoint(best_file, network, None, {})
        save_checkpoint(latest, network, optimiser, {"step": 0, "seconds": 0.0, "best": best, "best_step": 0})
    started = time.perf_counter()
    with tqdm(total=config.steps, initial=done, desc=stage, unit="step", smoothing=0.05, mininterval=1.0) as bar:
        for number in range(done, config.steps):
            network.train()
            torch.manual_seed(zlib.crc32(f"{seed}/{stage}/{number}".encode()))
            for group in optimiser.param_groups:
                group["lr"] = config.lr * learning_rate_factor(number, config)
            loss, terms = step(number)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            terms["grad_norm"] = float(nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm))
            if not math.isfinite(terms["grad_norm"]):
                raise FloatingPointError(f"Stage {stage} diverged at step {number}; lower {stage}.lr and run it again.")
            optimiser.step()
            done = number + 1
            bar.update()
            if done % 50 == 0:
                log.write(stage, done, {"loss": float(loss.detach()), **terms}, show=False)
                bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
            if done == config.steps or (config.eval_every and done % config.eval_every == 0):
                metrics = evaluate()
                log.write(stage, done, metrics, show=True)
                if metrics["score"] > best["score"]:
                    best, best_step = metrics, done
                    save_checkpoint(best_file, network, None, {})
            if done == config.steps or done % config.checkpoint_every == 0:
                spent = seconds + time.perf_counter() - started
                meta = {"step": done, "seconds": spent, "best": best, "best_step": best_step}
                save_checkpoint(latest, network, optimiser, meta)
    if config.steps:
        seconds = read_meta(latest)["seconds"]
    load_checkpoint(best_file, network, None)
    network.eval()
    return Outcome(best, best_step, seconds)


def learning_rate_factor(step: int, config: StageConfig) -> float:
    """Linear warm-up, then a cosine from 1 down to 0.1."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, progress))


def save_checkpoint(
    path: Path, network: nn.Module, optimiser: torch.optim.Optimizer | None, meta: dict[str, Any]
) -> None:
    """Writes weights, optimiser and meta as one file, whole or not at all. Raises StorageError, say of a full disk."""
    tensors = {f"weights/{name}": value.contiguous() for name, value in network.state_dict().items()}
    if optimiser is not None:
        for number, parameter in enumerate(_parameters(optimiser)):
            for name, value in optimiser.state[parameter].items():
                tensors[f"optimiser/{number}/{name}"] = value.contiguous()
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(save(tensors, {"meta": json.dumps(meta)}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"The disk under {path.parent} is full; free some space and run the same command again."
            ) from error
        raise StorageError(
            f"{path} cannot be written ({error.strerror}); mend that and run the same command again."
        ) from error


def load_checkpoint(path: Path, network: nn.Module, optimiser: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Puts a checkpoint into network and optimiser and returns its meta."""
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
        network.load_state_dict(
            {k.removeprefix("weights/"): file.get_tensor(k) for k in keys if k.startswith("weights/")}
        )
        if optimiser is not None:
            for number, parameter in enumerate(_parameters(optimiser)):
                start = f"optimiser/{number}/"
                state = {k.removeprefix(start): file.get_tensor(k) for k in keys if k.startswith(start)}
                if state:
                    optimiser.state[parameter] = state
        return json.loads((file.metadata() or {}).get("meta", "{}"))


def read_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, seconds, best, best_step."""
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {})["meta"])


def _parameters(optimiser: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def _groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only; embeddings, norms and biases are left alone."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        plain = parameter.dim() < 2 or "shared" in name or "relative_attention_bias" in name
        (free if plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
