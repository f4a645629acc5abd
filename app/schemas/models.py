"""Models, what they cost, and how traffic is dealt out among them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from pydantic import BaseModel, Field, StringConstraints, model_validator

from app.schemas.common import Body
from serving.online.deployment import Arm, Shadow, Traffic

MAX_VERSION_LENGTH = 256
MAX_PATH_LENGTH = 240  # of a name in any file system


class Cost(BaseModel):
    """Measured time of a batch of one shape on this machine."""

    reasoning_steps: int
    beam_rows: int = Field(description="the beam widths of the batch's searches, added up")
    median_ms: float
    p95_ms: float
    runs: int = Field(description="number of recent runs this is measured from")


class StepsFigures(BaseModel):
    """The accuracy of a number of reasoning steps, measured at export, and its time on this machine. null: not
    measured."""

    reasoning_steps: int
    auto: bool = Field(description="whether `reasoning_steps=auto` may take this many")
    users: int | None = Field(description="validation users that accuracy was measured on")
    of: int | None = Field(description="all validation users, of whom these were drawn")
    recall_at_10: float | None
    ndcg_at_10: float | None
    gain: float | None = Field(description="in NDCG@10 over 0 steps, on the same users")
    gain_low: float | None = Field(description="lower end of the gain's 95% interval over users")
    gain_high: float | None = Field(description="upper end of it")
    detectable: float | None = Field(description="smallest true gain that this many users show with 80% power")
    median_ms: float | None = Field(
        description="of recent searches that were alone in their batch, with the default beam width"
    )


class Model(BaseModel):
    version: str
    name: str
    active: bool
    items: int = Field(description="that may be recommended now")
    max_steps: int
    default_steps: int
    max_history_items: int
    max_beam_width: int
    dense_weight: float
    neighbours_weight: float
    categories: list[str] = Field(description="of all items that have not been removed")
    catalogues: list[str]
    accuracy: list[dict[str, Any]] = Field(description="measured at export, per number of reasoning steps")
    cost: list[Cost] = Field(description="measured on this machine, since the start")
    by_steps: list[StepsFigures] = Field(description="accuracy and time of every number of reasoning steps, 0 first")


class ModelsResponse(BaseModel):
    models: list[Model]


class ModelRequest(Body):
    path: Annotated[str, StringConstraints(min_length=1, max_length=MAX_PATH_LENGTH)] = Field(
        description="folder of the bundle, relative to STREAMREC_MODELS_DIR"
    )


Version = Annotated[str, StringConstraints(min_length=1, max_length=MAX_VERSION_LENGTH)]


class ArmBody(Body):
    """A share of the users, and the model that answers them."""

    version: Version
    percent: float = Field(gt=0, le=100)
    reasoning_steps: int | None = Field(
        None, ge=0, description="for requests that name none; default: the model's default"
    )


class ShadowBody(Body):
    """A model that also searches for requests, but whose answers nobody gets."""

    version: Version
    percent: float = Field(100, gt=0, le=100, description="share of the requests, drawn at random")


class TrafficBody(Body):
    name: Annotated[str, StringConstraints(max_length=64)] = Field(
        "", description="name of the experiment; another name assigns the users anew"
    )
    arms: Annotated[list[ArmBody], Field(max_length=16)] = Field(
        default_factory=list, description="at most 100% in total; the other users get the active model"
    )
    shadow: ShadowBody | None = None

    @model_validator(mode="after")
    def _at_most_everybody(self) -> TrafficBody:
        if sum(arm.percent for arm in self.arms) > 100 + 1e-9:
            raise ValueError("the arms together must not exceed 100%")
        return self

    def to_traffic(self) -> Traffic:
        arms = tuple(Arm(arm.version, arm.percent, arm.reasoning_steps) for arm in self.arms)
        shadow = None if self.shadow is None else Shadow(self.shadow.version, self.shadow.percent)
        return Traffic(self.name, arms, shadow)

    @staticmethod
    def of(traffic: Traffic) -> TrafficBody:
        return TrafficBody(
            name=traffic.name,
            arms=[ArmBody(**asdict(arm)) for arm in traffic.arms],
            shadow=None if traffic.shadow is None else ShadowBody(**asdict(traffic.shadow)),
        )


class TrafficResponse(TrafficBody):
    active: str
