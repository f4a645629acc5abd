"""Every setting of training, one dataclass a stage, each default stated once; a YAML file and `--set` override them.

The defaults are the repaired recipe; the paper's literal one is `training/literal.yaml`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from serving.types import EncoderAttention, Merge, StepForm
from training.data.prepare import SplitKind
from training.ids.semantic_ids import TokenizeConfig


class ConfigError(ValueError):
    """A setting that does not exist or does not fit; the message names it."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """The network's size and the form of its reasoning. reasoning_codes 0: reasoning tokens are item codes [paper]."""

    d_model: int = 128
    d_kv: int = 32
    d_ff: int = 512
    layers: int = 3
    heads: int = 4
    dropout: float = 0.1
    max_items: int = 20
    end_token: bool = True
    attention: EncoderAttention = "bidirectional"
    max_steps: int = 4
    reasoning_codes: int = 32
    step_form: StepForm = "both"
    paths: int = 1
    merge: Merge = "logsumexp"
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class StageConfig:
    """What every stage has. lr follows a linear warm-up and a cosine down to a tenth. eval_every 0: at the end only.

    batch_size: of a step, on all processes together. accumulate: in how many parts it is computed, to save memory.
    label_smoothing: of the target's tokens, not of reasoning labels.
    """

    steps: int = 3000
    batch_size: int = 256
    accumulate: int = 1
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 100
    clip_norm: float = 1.0
    label_smoothing: float = 0.0
    eval_every: int = 500
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        if min(self.batch_size, self.accumulate, self.checkpoint_every) < 1 or min(self.steps, self.eval_every) < 0:
            raise ConfigError(
                "batch_size, accumulate and checkpoint_every of a stage must be at least 1, "
                "steps and eval_every at least 0."
            )
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError("label_smoothing of a stage must be at least 0 and below 1.")


@dataclass(frozen=True, slots=True)
class PretrainConfig(StageConfig):
    """Stage 1. similar_weight 0 trains a plain TIGER.

    similar_items: items put before the target, drawn among its nearest `neighbours`.
    """

    plain_weight: float = 1.0
    similar_weight: float = 0.5
    similar_items: int = 1
    neighbours: int = 10


@dataclass(frozen=True, slots=True)
class SftConfig(StageConfig):
    """Stage 2. A weight of 0 turns a loss off.

    distillation_weight: of the KL that teaches the answer without steps what the answer after them says.
    inputs: `label` feeds the labels to the decoder [paper], `own` its own tokens.
    target: t of t - s_{i-1}, what residual labels are made from [open]: `item` the sum of the target's token embeddings
    and its free vector, `tokens` that sum alone, `content` the item's own embedding under a fixed projection.
    label_refresh: residual labels by the current weights, or `once`, by those that the stage started from [open].
    """

    steps: int = 1200
    lr: float = 5e-4
    eval_every: int = 300
    plain_weight: float = 1.0
    answer_weight: float = 1.0
    reasoning_weight: float = 0.2
    state_weight: float = 0.3
    quantization_weight: float = 0.1
    preference_weight: float = 0.0
    distillation_weight: float = 0.0
    state_loss: Literal["contrastive", "full_softmax"] = "full_softmax"
    labels: Literal["residual", "random", "pause"] = "residual"
    inputs: Literal["label", "own"] = "own"
    target: Literal["item", "tokens", "content"] = "item"
    label_refresh: Literal["every step", "once"] = "every step"
    balanced: bool = True
    contrastive_temperature: float = 0.07
    preference_beta: float = 0.1


@dataclass(frozen=True, slots=True)
class RlConfig(StageConfig):
    """Stage 3. Every `updates` steps sample `batch_size` users with `group` rollouts each, and learn from them.

    rollouts: `sample` draws thoughts and tokens, `beam` takes the best items of the constrained search after one greedy
    thought [open].
    anchor_weight: of the NLL of the target, for l = 0 and one l > 0.
    """

    steps: int = 200
    batch_size: int = 64
    lr: float = 3e-5
    weight_decay: float = 0.0
    warmup: int = 20
    eval_every: int = 50
    checkpoint_every: int = 20
    updates: int = 2
    group: int = 8
    rollouts: Literal["sample", "beam"] = "sample"
    clip: float = 0.2
    kl_weight: float = 1e-3
    anchor_weight: float = 1.0
    policy_weight: float = 0.1
    format_reward: float = 1.0
    match_reward: float = 1.0
    similarity_reward: float = 1.0
    likelihood_reward: float = 1.0
    rank_reward: float = 1.0

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        if self.updates < 1 or self.checkpoint_every % self.updates:
            raise ConfigError("rl.updates must be at least 1 and divide rl.checkpoint_every, so that a run can resume.")


@dataclass(frozen=True, slots=True)
class NeighboursConfig:
    """The memory of the log and the texts (training/neighbours.py). enabled: whether a run fits one.

    keep: weights per item. floor: what a share of nothing counts as, in the logarithm.
    """

    enabled: bool = False
    keep: int = 200
    floor: float = 1e-4

    def __post_init__(self) -> None:
        if self.keep < 1 or not 0 < self.floor <= 1:
            raise ConfigError("neighbours.keep must be at least 1, and neighbours.floor above 0 and at most 1.")


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """steps: which l are measured. valid_users: how many decide while training; the final choice takes choice_users.

    neighbours_weights, dense_candidates, dense_weights: what the final choice tries, the first two together and without
    the dense score.
    """

    steps: tuple[int, ...] = (0, 2, 4)
    beam: int = 20
    valid_users: int = 1000
    choice_users: int = 4000
    dense_weights: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)
    neighbours_weights: tuple[float, ...] = (0.0,)
    dense_candidates: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for name in ("dense_weights", "neighbours_weights", "dense_candidates"):
            if min(getattr(self, name), default=-1) < 0:
                raise ConfigError(f"evaluation.{name} must list at least one number, none below 0.")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One run, from interactions to bundle. name: the bundle's; empty: the data folder's. licence: of the data.

    given_ids: for tokenizer.kind `given`, the file's name in the data folder's semantic_ids (without .json.gz).
    lengths: the numbers of steps that stages 2 and 3 draw from; empty: 1..model.max_steps; [0]: nothing is thought.
    precision: of the stages' arithmetic; weights and optimiser are float32 in any case.
    """

    name: str = ""
    seed: int = 0
    given_ids: str = ""
    lengths: tuple[int, ...] = ()
    split: SplitKind = "leave-one-out"
    precision: Literal["float32", "bfloat16"] = "float32"
    licence: str = "unknown; ask the data's owner"
    tokenizer: TokenizeConfig = field(default_factory=TokenizeConfig)
    model: ModelSettings = field(default_factory=ModelSettings)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    neighbours: NeighboursConfig = field(default_factory=NeighboursConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        known = range(self.model.max_steps + 1)
        if not self.evaluation.steps or not all(steps in known for steps in self.evaluation.steps):
            raise ConfigError(
                f"evaluation.steps must list numbers in 0..{self.model.max_steps}, the range of model.max_steps, "
                f"not {list(self.evaluation.steps)}."
            )
        if not all(steps in known for steps in self.lengths):
            raise ConfigError(
                f"lengths must list numbers in 0..{self.model.max_steps}, the range of model.max_steps, "
                f"not {list(self.lengths)}."
            )
        if any(self.evaluation.neighbours_weights) and not self.neighbours.enabled:
            raise ConfigError("evaluation.neighbours_weights above 0 need neighbours.enabled=true.")
        if not self.model.max_steps and (self.sft.steps or self.rl.steps):
            raise ConfigError(
                "With model.max_steps=0 there is no reasoning to train; set sft.steps=0 and rl.steps=0 too."
            )

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))


def load_config(path: Path | None, overrides: list[str]) -> RunConfig:
    """The defaults, then a YAML file, then `key.key=value` overrides. Raises ConfigError naming the wrong key."""
    try:
        data = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path else {}
        if not isinstance(data, dict):
            raise ConfigError(f"{path} must hold keys and values, such as `sft: {{steps: 100}}`.")
        for override in overrides:
            key, separator, value = override.partition("=")
            if not separator:
                raise ConfigError(f"--set {override}: write key=value, such as sft.steps=100.")
            *parents, last = key.strip().split(".")
            node = data
            for parent in parents:
                node = node.setdefault(parent, {})
                if not isinstance(node, dict):
                    raise ConfigError(f"--set {override}: {parent} holds the value {node!r} already, not settings.")
            node[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"The configuration is not valid YAML: {str(error).splitlines()[0]}.") from error
    except OSError as error:
        raise ConfigError(
            f"The configuration {path} cannot be read ({error.strerror}); give an existing file."
        ) from error
    return read_config(data)


def read_config(data: Any) -> RunConfig:
    """Settings from plain values, defaults where there are none. Raises ConfigError naming the wrong key."""
    return _fill(RunConfig, data, "")


def _fill(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{where.rstrip('.') or 'The configuration'} must hold keys and values.")
    hints = get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(kind)]
    for key in data:
        if key not in names:
            raise ConfigError(f"There is no setting {where}{key}; known here: {', '.join(names)}.")
    return kind(**{key: _convert(hints[key], value, where + key) for key, value in data.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _fill(hint, value, where + ".")  # type: ignore[arg-type]
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{where} must be one of {', '.join(map(str, get_args(hint)))}, not {value!r}.")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, not {value!r}.")
        return tuple(_convert(get_args(hint)[0], entry, where) for entry in value)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as a string
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} must be of type {hint.__name__}, not {value!r}.")
