"""A data folder and settings with which all three stages take a second or two."""

from __future__ import annotations

from pathlib import Path

from tests.training.small import walks

QUICK = (
    "tokenizer.kind=random", "tokenizer.rqvae.levels=3", "tokenizer.rqvae.codes=8", "tokenizer.collaborative_dim=8",
    "model.d_model=16", "model.d_kv=8", "model.d_ff=32", "model.layers=1", "model.heads=2", "model.max_items=5",
    "model.max_steps=2", "model.reasoning_codes=6", "evaluation.steps=[0,2]", "evaluation.valid_users=20",
    "evaluation.choice_users=20", "evaluation.beam=10", "evaluation.dense_weights=[0,1]",
    *(f"{stage}.{name}" for stage in ("pretrain", "sft", "rl")
      for name in ("steps=20", "batch_size=16", "warmup=4", "eval_every=10", "checkpoint_every=4")),
    "rl.group=4", "rl.batch_size=8",
)  # fmt: skip


def write_shop(folder: Path, first: int = 0, pause: int = 1) -> Path:
    """first: the time of everybody's first event. pause: between two events."""
    folder.mkdir(parents=True)
    events = [
        f"u{user},i{item},{first + pause * at}" for user, walk in enumerate(walks()) for at, item in enumerate(walk)
    ]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *events]) + "\n")
    return folder


def command(name: str, data: Path, out: Path, *settings: str) -> list[str]:
    return [name, "--data", str(data), "--out", str(out), "--set", *QUICK, *settings]
