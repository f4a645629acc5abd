"""Every setting of training, one model a stage, each default and each choice stated once.

The defaults are the repaired recipe; the paper's literal one is `training/literal.yaml`. A YAML file and `--set`
override them (`training/config_file.py`). What the settings do is known by the modules that read them; here they are
only checked.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from serving.items.tokenizer import PACKAGED, CodesFrom
from serving.types import MAX_TYPE_LENGTH, EncoderAttention, Merge, Normalise, StepForm
from training.data.prepare import SplitKind


def _read_number(value: Any) -> Any:
    """YAML reads 1e-3, which has no point, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, BeforeValidator(_read_number)]
Weight = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Lengths = Annotated[tuple[Count, ...], Field(strict=False)]
Rate = Annotated[Number, Field(ge=0)]
SearchWeight = Annotated[Number, Field(ge=0, le=1000)]  # what a request may set over HTTP
Weights = Annotated[tuple[SearchWeight, ...], Field(strict=False, min_length=1)]
Counts = Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]


MemoryParts = Literal["both", "counted", "linear"]


class Settings(BaseModel):
    """Frozen; an unknown key, a value of another type and NaN are errors. Lists become tuples."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RqVaeConfig(Settings):
    """levels (M) codebooks of `codes` codes, each `latent` wide."""

    levels: Positive = 3
    codes: Positive = 256
    latent: Positive = 32
    pca: Positive = 128  # axes kept, at most
    whiten: bool = False  # every axis counts the same; else as its variance
    hidden: Positive = 256
    steps: Positive = 1200
    warmup_steps: Count = 200  # a plain autoencoder, so that k-means finds something to start from
    batch: Positive = 1024
    lr: Rate = 1e-3
    commitment: Weight = 0.25
    decay: Fraction = 0.95  # of the moving averages, per step
    dead_below: Weight = 0.2  # members per step, as a share of an even spread, below which a code is restarted
    restart_every: Positive = 50  # steps


class TokenizeConfig(Settings):
    """How semantic IDs are made. `random` takes its shape (levels, codes) from `rqvae`.

    source: what an item's embedding is made from; items without any text fall back to `collaborative`, and the report
    says so. text_weight: the share of text in the inner product of `both`. shared_codebook: whether the levels of given
    IDs have one codebook; null: as their file says, by naming all levels alike (`"<T_3>"`) or each its own way.
    """

    kind: Literal["rqvae", "random", "given"] = "rqvae"
    source: CodesFrom = "both"
    embedder: str = PACKAGED
    text_weight: Annotated[Number, Field(ge=0, le=1)] = 0.5
    collaborative_dim: Positive = 128
    shared_codebook: bool | None = None
    rqvae: RqVaeConfig = RqVaeConfig()


class ModelSettings(Settings):
    """The network's size and the form of its reasoning. reasoning_codes 0: reasoning tokens are item codes [paper].

    age_bias: a bias of the decoder's cross-attention by an item's age, 0 for the newest. With attention
    causal-by-item and without end_token, training is packed: several times faster.
    time_bias: another one by how long before the newest event an item's was; the data's times must be seconds.
    item_input: the encoder reads a vector of each item beside its tokens, which tell it apart only together.
    normalise: what a token's softmax runs over, the tokens that may stand at its position (`block`) or the whole
    `vocabulary` [paper].
    """

    d_model: Positive = 128
    d_kv: Positive = 32
    d_ff: Positive = 512
    layers: Positive = 3
    heads: Positive = 4
    dropout: Fraction = 0.1
    max_items: Positive = 20
    end_token: bool = True
    attention: EncoderAttention = "bidirectional"
    age_bias: bool = False
    time_bias: bool = False
    item_input: bool = False
    max_steps: Count = 4
    reasoning_codes: Count = 32
    step_form: StepForm = "both"
    paths: Positive = 1
    merge: Merge = "logsumexp"
    normalise: Normalise = "block"
    temperature: Annotated[Number, Field(gt=0)] = 1.0

    @property
    def packed(self) -> bool:
        """Whether one encoder pass serves all prefixes of a sequence: no token of a history depends on later ones."""
        return self.attention == "causal-by-item" and self.age_bias and not self.end_token


class StageConfig(Settings):
    """What every stage has. lr follows a linear warm-up and a cosine down to a tenth. eval_every 0: at the end only.

    patience: so many evaluations in a row without a better one end the stage before its `steps`; 0: none do.
    batch_size: examples of a step, on all processes together. accumulate: in how many micro-batches it is computed, to
    save memory. label_smoothing: of the target's tokens, not of reasoning labels.
    """

    steps: Count = 3000
    batch_size: Positive = 256
    accumulate: Positive = 1
    lr: Rate = 1e-3
    weight_decay: Weight = 0.05
    warmup: Count = 100
    clip_norm: Annotated[Number, Field(gt=0)] = 1.0
    label_smoothing: Fraction = 0.0
    eval_every: Count = 500
    patience: Count = 0
    checkpoint_every: Positive = 100


class PretrainConfig(StageConfig):
    """Stage 1. similar_weight 0 trains a plain TIGER.

    state_weight: of the full softmax over all items from the decoder's state without reasoning, which trains the dense
    score as a sequence model is trained. similar_items: items put before the target, drawn among its nearest
    `neighbours`.
    """

    lr: Rate = 3e-3
    label_smoothing: Fraction = 0.1
    plain_weight: Weight = 1.0
    state_weight: Weight = 0.0
    similar_weight: Weight = 0.5
    similar_items: Positive = 1
    neighbours: Positive = 10


class SftConfig(StageConfig):
    """Stage 2. A weight of 0 turns a loss off.

    distillation_weight: of the KL that teaches the answer without steps what the answer after them says.
    preference_after: steps before the preference begins to count, with the network of that step as its reference.
    inputs: `label` feeds the labels to the decoder [paper], `own` its own tokens. apart: begin with reasoning codes and
    start tokens set from the data (training/stages/begin.py), and not as stage 1 left them. entropy_floor: the
    share of its maximum that the entropy of reasoning tokens must keep after the warm-up and the first 200 steps, or
    the run ends; 0: no check.
    """

    steps: Count = 1200
    lr: Rate = 5e-4
    eval_every: Count = 300
    plain_weight: Weight = 1.0
    answer_weight: Weight = 1.0
    reasoning_weight: Weight = 0.2
    state_weight: Weight = 0.3
    quantization_weight: Weight = 0.1
    preference_weight: Weight = 0.0
    distillation_weight: Weight = 0.0
    state_loss: Literal["contrastive", "full_softmax"] = "full_softmax"
    labels: Literal["residual", "random", "pause"] = "residual"
    inputs: Literal["label", "own"] = "own"
    balanced: bool = True
    apart: bool = True
    entropy_floor: Fraction = 0.25
    contrastive_temperature: Annotated[Number, Field(gt=0)] = 0.07
    preference_beta: Weight = 0.1
    preference_after: Count = 300


class RlConfig(StageConfig):
    """Stage 3. Every `updates` steps sample `batch_size` users with `group` rollouts each, and learn from them.

    steps: null: one epoch, every example rolled out once. anchor_weight: of the NLL of the target, for l = 0 and one
    l > 0. policy_weight: of the policy, to begin with. policy_share: its gradient's norm as a share of the anchor's,
    which the weight then follows; 0: the weight stays. inside_trie: sample items that exist, or any tokens [paper].
    standardise: `each` reward within its group before they are summed, or their `sum` [paper].
    """

    steps: Count | None = None  # type: ignore[assignment]  # a stage runs with a number, see `resolved`
    batch_size: Positive = 64
    lr: Rate = 3e-5
    weight_decay: Weight = 0.0
    warmup: Count = 20
    eval_every: Count = 200
    checkpoint_every: Positive = 20
    updates: Positive = 2
    group: Positive = 8
    clip: Weight = 0.2
    kl_weight: Weight = 1e-3
    anchor_weight: Weight = 1.0
    policy_weight: Weight = 0.1
    policy_share: Weight = 0.5
    inside_trie: bool = True
    standardise: Literal["each", "sum"] = "each"
    format_reward: Number = 1.0
    match_reward: Number = 1.0
    similarity_reward: Number = 1.0
    likelihood_reward: Number = 1.0
    rank_reward: Number = 1.0
    answer_reward: Number = 1.0

    def resolved(self, examples: int) -> RlConfig:
        """With a number of steps, for so many training examples."""
        if self.steps is not None:
            return self
        return self.model_copy(update={"steps": -(-examples // self.batch_size) * self.updates})

    @model_validator(mode="after")
    def _checkpoints_between_rollouts(self) -> Self:
        if self.checkpoint_every % self.updates:
            raise ValueError("rl.updates must divide rl.checkpoint_every, so that a run can resume.")
        return self


class RefitConfig(Settings):
    """Last of all, once validation has chosen everything: the events that it held out (training/refit.py).

    epochs: over them, for the network; 0: neither network nor memory learns from them. lr: see StageConfig.
    """

    epochs: Count = 0
    lr: Rate = 5e-4


class HistoryConfig(Settings):
    """What events count. type_weights: by type, in the item memory; 1 where a type is not named. Those of weight 0 are
    left out everywhere, as if they had not happened.
    """

    type_weights: dict[Annotated[str, Field(min_length=1, max_length=MAX_TYPE_LENGTH)], SearchWeight] = {}


class NeighboursConfig(Settings):
    """The item graph (training/memory.py). enabled: whether a run fits one.

    parts: what was counted in the log and the texts, what a linear model learnt, or both, in the blend that validation
    prefers. keep: weights per item. candidates: how many of its best items join those that the beam finds; each costs a
    search as much as a beam does.
    """

    enabled: bool = False
    parts: MemoryParts = "both"
    keep: Positive = 200
    candidates: Count = 10


class EvalConfig(Settings):
    """steps: which l are measured. valid_users: how many decide while training; the final choice takes choice_users.

    exclude_seen: whether a history's items are excluded, as a request does by default, or may come again, as in
    published tables. dense_weights, dense_candidates: what the final choice tries, together.
    """

    steps: Counts = (0, 2, 4)
    beam: Positive = 20
    valid_users: Positive = 1000
    choice_users: Annotated[int, Field(ge=2)] = 4000  # of one user nobody can say what is more than chance
    exclude_seen: bool = True
    dense_weights: Weights = (0.0, 0.25, 0.5, 1.0)
    dense_candidates: Counts = (0,)


class RunConfig(Settings):
    """One run, from interactions to bundle. name: the bundle's; empty: the data folder's. licence: of the data.

    given_ids: for tokenizer.kind `given`, the file's name in the data folder's semantic_ids (without .json.gz).
    lengths: the numbers of steps that stages 2 and 3 draw from; empty: 1..model.max_steps; [0]: no reasoning.
    precision: of the stages' arithmetic; weights and optimiser are float32 in any case.
    taught_by: of an update, which sets it: the last supervised stage that the weights it begins with have been through.
    """

    name: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    given_ids: str = ""
    lengths: Lengths = ()
    split: SplitKind = "leave-one-out"
    precision: Literal["float32", "bfloat16"] = "float32"
    licence: str = "unknown; ask the data's owner"
    taught_by: Literal["", "pretrain", "sft"] = ""
    tokenizer: TokenizeConfig = TokenizeConfig()
    model: ModelSettings = ModelSettings()
    pretrain: PretrainConfig = PretrainConfig()
    sft: SftConfig = SftConfig()
    rl: RlConfig = RlConfig()
    history: HistoryConfig = HistoryConfig()
    neighbours: NeighboursConfig = NeighboursConfig()
    evaluation: EvalConfig = EvalConfig()
    refit: RefitConfig = RefitConfig()

    @property
    def last_supervised(self) -> Literal["pretrain", "sft"]:
        """The last stage that has taught the network from targets, in this run or before the one that it updates."""
        return "sft" if self.sft.steps else self.taught_by or "pretrain"

    @model_validator(mode="after")
    def _stages_agree(self) -> Self:
        for name, lengths in (("evaluation.steps", self.evaluation.steps), ("lengths", self.lengths)):
            if max(lengths, default=0) > self.model.max_steps:
                raise ValueError(
                    f"{name} must list numbers in 0..{self.model.max_steps}, the range of model.max_steps, "
                    f"not {list(lengths)}."
                )
        if not self.model.max_steps and (self.sft.steps or self.rl.steps != 0):
            raise ValueError(
                "With model.max_steps=0 there is no reasoning to train; set sft.steps=0 and rl.steps=0 too."
            )
        return self

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")
