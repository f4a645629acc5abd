"""Bodies of requests and responses. Bounds that depend on settings or the bundle are checked by the recommender."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    TypeAdapter,
    WithJsonSchema,
    model_validator,
)

from serving.ids import is_unicode
from serving.items.changed import Kind
from serving.items.filter_parser import MAX_LENGTH
from serving.online.counters import Window
from serving.online.deployment import Arm, Shadow, Traffic
from serving.types import MAX_BOOSTS, MAX_ID_LENGTH, MAX_TIMESTAMP, MAX_TYPE_LENGTH, Event

MAX_ITEMS = 10_000
MAX_PATHS = 16
MAX_RANKED = 1000
MAX_VERSION_LENGTH = 256
MAX_RECEIPT_LENGTH = 32_768  # of the id of a recommendation with 10,000 items
MAX_PATH_LENGTH = 240  # of a name in any file system
EXAMPLE: dict[str, JsonValue] = {"history": [], "k": 5}  # works as it is, whatever the catalogue

Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_LENGTH)]
Items = Annotated[list[Id], Field(max_length=MAX_ITEMS)]
RecommendationId = Annotated[str, StringConstraints(min_length=1, max_length=MAX_RECEIPT_LENGTH)]


def _whole(text: str) -> str:
    if not is_unicode(text):
        raise ValueError("has half a character in it (a surrogate without its other half)")
    return text


Text = Annotated[str, AfterValidator(_whole)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Words = Annotated[Text, Field(max_length=1000)]
FieldValue = Words | float | bool | Annotated[list[Words], Field(max_length=100)]
FilterText = Annotated[str, Field(min_length=1, max_length=MAX_LENGTH)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)  # "10" is not a number


class HistoryEvent(Body):
    """What somebody did with an item; its id alone stands for an event of which nothing else is known."""

    item_id: Id
    type: Annotated[Text, StringConstraints(min_length=1, max_length=MAX_TYPE_LENGTH)] | None = Field(
        None, description="such as view or purchase; a model may give types weights, and leave some out"
    )
    value: float | None = Field(None, description="such as a price or a rating; kept with the event")
    timestamp: float | None = Field(None, ge=0, le=MAX_TIMESTAMP, description="seconds since 1970")

    def to_event(self) -> Event:
        return Event(self.item_id, self.type, self.value, self.timestamp)


# Ids come first: a history without events pays nothing for there being some.
HistoryItem = Annotated[Id | HistoryEvent, Field(union_mode="left_to_right")]


class Boost(Body):
    """Multiplies what the items that pass are worth: their score is that of the model + log(factor)."""

    filter: FilterText
    factor: float = Field(ge=0.001, le=1000, description="above 1 for more of them, below for fewer")


class Answering(Body):
    """How the model answers."""

    reasoning_paths: int | None = Field(
        None, ge=1, le=MAX_PATHS, description="reasoning paths searched in parallel; default: the bundle's"
    )
    dense_weight: float | None = Field(
        None, ge=0, le=1000, description="weight of the dense score; default: the bundle's"
    )
    neighbours_weight: float | None = Field(
        None, ge=0, le=1000, description="weight of the item graph, 0: the network alone; default: the bundle's"
    )
    filter: FilterText | None = Field(
        None, description='only items that pass, such as price < 50 and brand in ["A", "B"]; docs/FILTERS.md has all'
    )
    boost: Annotated[list[Boost], Field(max_length=MAX_BOOSTS)] | None = Field(
        None, description="what to recommend more of, or less"
    )
    timeout_ms: float | None = Field(None, gt=0, le=600_000, description="time budget")


class UserRequest(Answering):
    """The user, their history, and how the model answers."""

    user_id: Id | None = Field(None, description="without it nothing is cached and no known history is used")
    history: Annotated[list[HistoryItem], Field(max_length=MAX_ITEMS)] | None = Field(
        None, description="item ids and events, oldest first, as given; omitted or empty: the known history"
    )
    explain: bool = False


class Listing(Answering):
    """What may be recommended, how much of it, and how it is listed."""

    k: int = Field(10, ge=1, description="how many items to return")
    beam_width: int | None = Field(
        None, ge=1, description="at least k; default: the larger of k and the service's default"
    )
    exclude_seen: bool = Field(True, description="never recommend items of the history")
    allow: Items | None = Field(None, description="recommend only these")
    deny: Items = Field(default_factory=list, description="never recommend these")
    categories: Annotated[list[Id], Field(max_length=100)] = Field(
        default_factory=list, description="recommend only items in at least one of these; empty: no restriction"
    )
    catalogue: Id | None = Field(None, description="recommend only items of this named subset")
    diversity: float = Field(
        0, ge=0, le=1, description="how much a list avoids items like each other, chosen from all that the beams find"
    )
    max_per_category: int | None = Field(
        None, ge=1, description="most items of any one category; the list is shorter where the beams find no others"
    )
    rotation: float = Field(
        0,
        ge=0,
        le=1,
        description="how far items go down that the user was shown lately and did not take, as POST /feedback says: "
        "at 0.5 as if half as probable, at 1 behind all others",
    )
    explore: int = Field(
        0,
        ge=0,
        description="slots kept for new items, which nobody had when the model was trained, the model's best first; "
        "where there are fewer, others fill the list",
    )

    @model_validator(mode="after")
    def _k_fits_the_beam(self) -> Self:
        if self.beam_width is not None and self.k > self.beam_width:
            raise ValueError("k must not exceed beam_width")
        if self.explore > self.k:
            raise ValueError("explore must not exceed k")
        return self


class RecommendRequest(Listing, UserRequest):
    """The user, their history, and what may be recommended to them."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    scenario: Id | None = Field(None, description="name of a preset of all that this request leaves out")
    after: RecommendationId | None = Field(
        None,
        description="recommendation_id of the page before: this answer goes on behind it. Send all else as for that "
        "page; all pages together have at most as many items as the widest beam permitted",
    )


class Scenario(Listing):
    """A preset of requests that name it. What a request says itself wins."""

    reasoning_steps: Annotated[int, Field(ge=0)] | Literal["auto"] | None = Field(
        None, description="default: the model's default"
    )


class NamedScenario(Scenario):
    name: str


class ScenariosResponse(BaseModel):
    scenarios: list[NamedScenario]


class RankRequest(UserRequest):
    """The user, their history, and the items to put in order for them."""

    items: Annotated[list[Id], Field(min_length=1, max_length=MAX_RANKED)] = Field(
        description="item ids; each is scored, seen ones too, and comes back once"
    )


# Parts of every answer. The service itself makes them, so they need no validation: dataclasses are cheaper than models.


@dataclass(slots=True)
class RecommendedItem:
    """One item of an answer."""

    item_id: str
    score: float
    title: str | None = None
    categories: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Timings:
    """Milliseconds. `encode`, `reason` and `decode` are those of the batch that the request was in."""

    queue: float = 0.0
    cache: float = 0.0
    encode: float = 0.0
    reason: float = 0.0
    decode: float = 0.0
    total: float = 0.0


class NamedItem(BaseModel):
    item_id: str
    title: str | None = None


class ReasoningStep(BaseModel):
    """The model's state before any reasoning (step 0) or after a reasoning step."""

    step: int
    token: int | None = Field(None, description="vocabulary id; null at step 0, or if steps have no tokens")
    log_probability: float | None = None
    nearest_items: list[NamedItem]


class ItemExplanation(BaseModel):
    item_id: str
    token_log_probabilities: list[float] = Field(description="one per token of the semantic ID")
    dense_score: float
    neighbour_score: float | None = Field(
        None,
        description="log of the item's share in the item graph, or its log score; null if it has none",
    )
    boost: float | None = Field(
        None, exclude_if=lambda boost: boost is None, description="log of the factors, added to the score"
    )
    similarity: list[float] = Field(description="cosine similarity of the state and the item, one per step")


class Explanation(BaseModel):
    """The items nearest to the model's state after each step, and the parts of each item's score."""

    steps: list[ReasoningStep]
    items: list[ItemExplanation]
    dense_weight: float
    neighbours_weight: float
    gate: float | None = Field(
        None,
        exclude_if=lambda gate: gate is None,
        description="the network's probability g in score = log(g * exp(log-probabilities + dense_weight * dense_score)"
        " ** alpha + (1 - g) * exp(neighbour_score) ** beta) / alpha; absent if the model adds neighbours_weight *"
        " neighbour_score instead",
    )
    network_power: float = Field(1.0, exclude_if=lambda power: power == 1, description="alpha; absent if it is 1")
    memory_power: float = Field(1.0, exclude_if=lambda power: power == 1, description="beta; absent if it is 1")


@dataclass(slots=True)
class RecommendResponse:
    """The answer to one request."""

    recommendation_id: str
    user_id: str | None
    model_version: str
    source: Literal["model", "popularity"]
    reasoning_steps: int
    reasoning_paths: int
    beam_width: Annotated[int, Field(description="0 if given items were ranked: nothing was searched for then")]
    cache: Literal["memory", "redis", "miss", "off"]
    items: Annotated[list[RecommendedItem], Field(description="best first, distinct")]
    unknown_items: Annotated[
        list[str],
        Field(
            description="ids in history, allow or deny that are not in the catalogue; items that could not be ranked"
        ),
    ]
    timings_ms: Timings
    explanation: Explanation | None = None


ANSWER = TypeAdapter(RecommendResponse)


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    field: str | None = None
    position: int | None = Field(None, description="of the character at which a filter is wrong, the first being 1")
    errors: list[dict[str, str]] | None = Field(None, description="all invalid fields, if there are several")
    retry_after: int | None = Field(None, description="seconds")


class BatchRequest(Body):
    """Each request is validated on its own, so that an invalid one does not affect the others."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"requests": [EXAMPLE]}]})

    requests: Annotated[
        list[Any],
        Field(min_length=1),
        WithJsonSchema({"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/RecommendRequest"}}),
    ]


class BatchResponse(BaseModel):
    results: list[RecommendResponse | Problem] = Field(description="in the order of the requests")


class EventsRequest(Body):
    items: Annotated[list[HistoryItem], Field(min_length=1, max_length=1000)] = Field(
        description="item ids and events, oldest first, as given"
    )


class EventsResponse(BaseModel):
    user_id: str
    stored: int
    history_length: int
    unknown_items: list[str] = Field(description="stored, but not in the current catalogue")


class UserResponse(BaseModel):
    user_id: str
    items: list[str | HistoryEvent] = Field(description="the known history, oldest first, as it was sent")
    cached: list[str] = Field(description="the cache tiers that hold an encoded history")
    shown: list[str] = Field(description="items shown lately and not taken, oldest first; kept for rotation")


class Item(BaseModel):
    item_id: str
    title: str | None
    categories: list[str]
    brand: str | None = None
    fields: dict[str, FieldValue] = {}
    available_from: datetime | None = None
    available_until: datetime | None = None
    popularity: float
    tokens: list[int] = Field(description="the semantic ID as vocabulary ids")


class SimilarItem(BaseModel):
    item_id: str
    title: str | None
    categories: list[str]
    by: Literal["together", "content"]
    score: float = Field(
        description="together: this item's share of what follows or resembles the other; content: cosine similarity"
    )


class SimilarResponse(BaseModel):
    item_id: str
    model_version: str
    items: list[SimilarItem] = Field(description="best first; where both kinds are there, those taken together first")
    unknown_items: list[str] = Field(description="ids in allow or deny that are not in the catalogue")


class PopularResponse(BaseModel):
    model_version: str
    window: Window
    items: list[RecommendedItem] = Field(
        description="best first; score: events in the window, or how far they are above what was to be expected, in "
        "standard deviations; 0: by the bundle's popularity"
    )
    events: float = Field(description="in the window, on all items; an event counts less the older it is")
    shared: bool = Field(description="false: counted by the process that answered, and no other")
    unknown_items: list[str] = Field(description="ids in allow or deny that are not in the catalogue")


class ItemsResponse(BaseModel):
    items: list[Item]


FeedbackEvent = Literal["impression", "click", "like", "dislike", "cart", "purchase", "play", "share"]


class FeedbackRequest(Body):
    """What somebody did with an item of a recommendation."""

    recommendation_id: RecommendationId
    item_id: Id
    event: FeedbackEvent
    value: float | None = Field(None, description="such as a price or seconds played; kept as it is")
    time: float | None = Field(
        None, ge=0, le=1e11, description="seconds since the epoch; default: when the request came"
    )


class FeedbackResponse(BaseModel):
    counted: bool = Field(description="false: this event on this item of this recommendation had been counted before")
    position: int = Field(description="of the item in the list, 1 for the best; pages count on")
    kept: bool = Field(description="whether it can be trained on later; false: it is only counted")


class Rate(BaseModel):
    """A share, with the 95% interval that its number of cases leaves (Wilson)."""

    share: float
    low: float
    high: float


class FeedbackSummary(BaseModel):
    """Of one model, source and number of steps, since the start of this service."""

    version: str
    source: str
    reasoning_steps: int
    recommendations: int
    events: dict[str, int]
    hit_rate: Rate | None = Field(description="recommendations with any event but impressions; null without any")
    click_through_rate: Rate | None = Field(description="clicks per impression; null without impressions")


class FeedbackSummaries(BaseModel):
    summaries: list[FeedbackSummary]


class ItemFields(Body):
    """All that is known of an item. Its text (title, brand, categories, description) gives a new item its place."""

    title: Annotated[Text, Field(max_length=1000)] | None = None
    brand: Annotated[Text, Field(max_length=1000)] | None = None
    categories: Annotated[list[Id], Field(max_length=100)] = []
    description: Annotated[Text, Field(max_length=10_000)] | None = None
    fields: Annotated[dict[Name, FieldValue], Field(max_length=50)] = Field(
        {},
        description="what else is known, for filters: numbers, strings, booleans, lists; ISO 8601 strings are times",
    )
    available_from: AwareDatetime | None = Field(None, strict=False, description="before, it is never recommended")
    available_until: AwareDatetime | None = Field(None, strict=False, description="from then on, neither")

    @model_validator(mode="after")
    def _window_is_open(self) -> Self:
        if self.available_from and self.available_until and self.available_from >= self.available_until:
            raise ValueError("available_until must be later than available_from")
        return self

    def to_entry(self, item_id: str) -> dict[str, Any]:
        """As the log of changes has it: times in seconds since 1970."""
        begin, end = self.available_from, self.available_until
        times = {
            "available_from": None if begin is None else begin.timestamp(),
            "available_until": None if end is None else end.timestamp(),
        }
        return self.model_dump(exclude={"item_id"}) | {"item_id": item_id} | times


class PutItem(ItemFields):
    item_id: Id


class ItemsRequest(Body):
    items: Annotated[list[PutItem], Field(min_length=1, max_length=1000)]


class ItemsPut(BaseModel):
    results: list[Item | Problem] = Field(description="one for each item of the request, in its order")


class ChangedItem(BaseModel):
    """An item that is not as the model's bundle has it, by its last change."""

    item_id: str
    title: str | None
    change: Kind = Field(description="added: the bundle has no such item; changed: it has; removed: in no answer")
    changed_at: datetime | None = Field(description="null where the log of changes has no time")
    available_from: datetime | None
    available_until: datetime | None


class ChangedItems(BaseModel):
    position: str = Field(description="of the last change that is in the list, as GET /catalogues has it")
    items: list[ChangedItem] = Field(description="the one that changed last first, each once")
    next: int | None = Field(description="what `after` takes to go on behind these; null at the end")


class CatalogueItems(Body):
    """A named subset as a list."""

    items: Items = Field(description="those that the catalogue does not have are ignored")


class CatalogueFilter(Body):
    """A named subset as whatever passes a filter, now and as items and times change."""

    filter: FilterText


class NamedCatalogue(BaseModel):
    name: str
    items: int = Field(description="listed items in it")
    filter: str | None = Field(None, exclude_if=lambda text: text is None, description="absent if it is a list")


class CataloguesResponse(BaseModel):
    """The live catalogue of the active model, as this process has it."""

    version: str = Field(description="of the model")
    position: str = Field(description="of the last change applied: equal where all have applied the same")
    items: int = Field(description="items that may be recommended")
    lag_seconds: float = Field(description="since this process last knew that it has applied every change")
    durable: bool = Field(description="whether changes outlive a restart")
    catalogues: list[NamedCatalogue]


class Cost(BaseModel):
    """Measured time of a batch of one shape on this machine."""

    reasoning_steps: int
    beam_rows: int = Field(description="the beam widths of the batch's searches, added up")
    median_ms: float
    p95_ms: float
    runs: int = Field(description="how many recent runs this is measured from")


class Model(BaseModel):
    version: str
    name: str
    active: bool
    items: int
    max_steps: int
    default_steps: int
    max_history_items: int
    max_beam_width: int
    dense_weight: float
    neighbours_weight: float
    categories: list[str]
    catalogues: list[str]
    accuracy: list[dict[str, Any]] = Field(description="measured at export, per number of reasoning steps")
    cost: list[Cost] = Field(description="measured on this machine, since the start")


class ModelsResponse(BaseModel):
    models: list[Model]


class ModelRequest(Body):
    path: Annotated[str, StringConstraints(min_length=1, max_length=MAX_PATH_LENGTH)] = Field(
        description="folder of the bundle, relative to STREAMREC_MODELS_DIR"
    )


Version = Annotated[str, StringConstraints(min_length=1, max_length=MAX_VERSION_LENGTH)]


class ArmBody(Body):
    """A share of the users, and what answers them."""

    version: Version
    percent: float = Field(gt=0, le=100)
    reasoning_steps: int | None = Field(
        None, ge=0, description="of requests that name none; default: the model's default"
    )


class ShadowBody(Body):
    """A model that searches for requests as well, and whose answers nobody gets."""

    version: Version
    percent: float = Field(100, gt=0, le=100, description="of the requests, drawn by chance")


class TrafficBody(Body):
    name: Annotated[str, StringConstraints(max_length=64)] = Field(
        "", description="of the experiment; another name deals the users out anew"
    )
    arms: Annotated[list[ArmBody], Field(max_length=16)] = Field(
        default_factory=list, description="at most 100% together; the rest of the users gets the active model"
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


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class Tensor(BaseModel):
    name: str
    datatype: str
    shape: list[int] = Field(description="-1: of any length")


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class ModelReady(BaseModel):
    name: str
    ready: bool
