"""What the service takes and answers, as types of dictionaries.

Written by `make clients` from the OpenAPI document; do not edit."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict


class ArmBody(TypedDict):
    """A share of the users, and the model that answers them."""

    version: str
    percent: float
    reasoning_steps: NotRequired[int | None]
    """for requests that name none; default: the model's default"""


class BatchRequest(TypedDict):
    """Each request is validated on its own, so that an invalid one does not affect the others."""

    requests: list[RecommendRequest]


class BatchResponse(TypedDict):
    results: list[RecommendResponse | Problem]
    """in the order of the requests"""


class Boost(TypedDict):
    """Adds log(factor) to the model's score of every item that passes the filter."""

    filter: str
    factor: float
    """above 1 for more of these items, below 1 for fewer"""


class CatalogueFilter(TypedDict):
    """A named subset of whatever passes a filter, now and as items and times change."""

    filter: str


class CatalogueItems(TypedDict):
    """A named subset as a list."""

    items: list[str]
    """ids that the catalogue does not have are ignored"""


class CataloguesResponse(TypedDict):
    """The live catalogue of the active model, as this process has it."""

    version: str
    """version of the model"""
    position: str
    """position of the last change applied; equal in processes that have applied the same changes"""
    items: int
    """number of items that may be recommended"""
    lag_seconds: float
    """seconds since this process last knew that it had applied every change"""
    durable: bool
    """whether changes outlive a restart"""
    catalogues: list[NamedCatalogue]


class ChangedItem(TypedDict):
    """An item that differs from what the model's bundle has, with its last change."""

    item_id: str
    title: str | None
    change: Literal["added"] | Literal["changed"] | Literal["removed"]
    """added: not in the bundle; changed: in the bundle; removed: in no answer any more"""
    changed_at: str | None
    """null if the log of changes has no time for it"""
    available_from: str | None
    available_until: str | None


class ChangedItems(TypedDict):
    position: str
    """position of the last change in the list, as in GET /catalogues"""
    items: list[ChangedItem]
    """the most recently changed first, each once"""
    next: int | None
    """the `after` of the next page; null at the end"""


class Cost(TypedDict):
    """Measured time of a batch of one shape on this machine."""

    reasoning_steps: int
    beam_rows: int
    """the beam widths of the batch's searches, added up"""
    median_ms: float
    p95_ms: float
    runs: int
    """number of recent runs this is measured from"""


class EventsRequest(TypedDict):
    items: list[str | HistoryEvent]
    """item ids and events, oldest first, as given"""


class EventsResponse(TypedDict):
    user_id: str
    stored: int
    history_length: int
    unknown_items: list[str]
    """stored, but not in the current catalogue"""


class Explanation(TypedDict):
    """The items nearest to the model's state after each step, and the parts of each item's score."""

    steps: list[ReasoningStep]
    items: list[ItemExplanation]
    dense_weight: float
    neighbours_weight: float
    gate: NotRequired[float | None]
    """the network's probability g in score = log(g * exp(log-probabilities + dense_weight * dense_score) ** alpha + (1
    - g) * exp(neighbour_score) ** beta) / alpha; absent if the model adds neighbours_weight * neighbour_score
    instead"""
    network_power: NotRequired[float]
    """alpha; absent if it is 1"""
    memory_power: NotRequired[float]
    """beta; absent if it is 1"""


class FeedbackRequest(TypedDict):
    """What somebody did with an item of a recommendation."""

    recommendation_id: str
    item_id: str
    event: (
        Literal["impression"]
        | Literal["click"]
        | Literal["like"]
        | Literal["dislike"]
        | Literal["cart"]
        | Literal["purchase"]
        | Literal["play"]
        | Literal["share"]
    )
    value: NotRequired[float | None]
    """such as a price or seconds played; kept as it is"""
    time: NotRequired[float | None]
    """seconds since the epoch; default: when the request arrived"""


class FeedbackResponse(TypedDict):
    counted: bool
    """false: this event on this item of this recommendation was counted before"""
    position: int
    """position of the item in the list, 1 for the best; the next page counts on"""
    kept: bool
    """whether it is kept for training; false: it is only counted"""


class FeedbackSummaries(TypedDict):
    summaries: list[FeedbackSummary]


class FeedbackSummary(TypedDict):
    """Feedback on one model, source and number of steps, since this service started."""

    version: str
    source: str
    reasoning_steps: int
    recommendations: int
    events: dict[str, int]
    hit_rate: Rate | None
    """share of recommendations with any event but impressions; null without any"""
    click_through_rate: Rate | None
    """clicks per impression; null without impressions"""


class HistoryEvent(TypedDict):
    """What somebody did with an item; an item id alone stands for an event about which nothing else is known."""

    item_id: str
    type: NotRequired[str | None]
    """such as view or purchase; a model may weight types, and leave some out"""
    value: NotRequired[float | None]
    """such as a price or a rating; kept with the event"""
    timestamp: NotRequired[float | None]
    """seconds since 1970"""


class Item(TypedDict):
    item_id: str
    title: str | None
    categories: list[str]
    brand: NotRequired[str | None]
    fields: NotRequired[dict[str, str | float | bool | list[str]]]
    available_from: NotRequired[str | None]
    available_until: NotRequired[str | None]
    popularity: float
    tokens: list[int]
    """the semantic ID as vocabulary ids"""


class ItemExplanation(TypedDict):
    item_id: str
    token_log_probabilities: list[float]
    """one per token of the semantic ID"""
    dense_score: float
    neighbour_score: NotRequired[float | None]
    """log of the item's share in the item graph, or its log score; null if it has none"""
    boost: NotRequired[float | None]
    """log of the factors, added to the score"""
    similarity: list[float]
    """cosine similarity of the state and the item, one per step"""


class ItemFields(TypedDict):
    """All that is known about an item. A new item gets its semantic ID from its text: title, brand, categories and
    description."""

    title: NotRequired[str | None]
    brand: NotRequired[str | None]
    categories: NotRequired[list[str]]
    description: NotRequired[str | None]
    fields: NotRequired[dict[str, str | float | bool | list[str]]]
    """other attributes, for filters: numbers, strings, booleans, lists; ISO 8601 strings are times"""
    available_from: NotRequired[str | None]
    """not recommended before this time"""
    available_until: NotRequired[str | None]
    """not recommended from this time on"""


class ItemsPut(TypedDict):
    results: list[Item | Problem]
    """one for each item of the request, in the same order"""


class ItemsRequest(TypedDict):
    items: list[PutItem]


class ItemsResponse(TypedDict):
    items: list[Item]


class Model(TypedDict):
    version: str
    name: str
    active: bool
    items: int
    """that may be recommended now"""
    max_steps: int
    default_steps: int
    max_history_items: int
    max_beam_width: int
    dense_weight: float
    neighbours_weight: float
    categories: list[str]
    """of all items that have not been removed"""
    catalogues: list[str]
    accuracy: list[dict[str, Any]]
    """measured at export, per number of reasoning steps"""
    cost: list[Cost]
    """measured on this machine, since the start"""
    by_steps: list[StepsFigures]
    """accuracy and time of every number of reasoning steps, 0 first"""


class ModelMetadata(TypedDict):
    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class ModelReady(TypedDict):
    name: str
    ready: bool


class ModelRequest(TypedDict):
    path: str
    """folder of the bundle, relative to STREAMREC_MODELS_DIR"""


class ModelsResponse(TypedDict):
    models: list[Model]


class NamedCatalogue(TypedDict):
    name: str
    items: int
    """number of its items that may be recommended"""
    filter: NotRequired[str | None]
    """absent if it is a list"""


class NamedItem(TypedDict):
    item_id: str
    title: NotRequired[str | None]


class NamedScenario(TypedDict):
    reasoning_paths: NotRequired[int | None]
    """reasoning paths searched in parallel; default: the bundle's"""
    dense_weight: NotRequired[float | None]
    """weight of the dense score; default: the bundle's"""
    neighbours_weight: NotRequired[float | None]
    """weight of the item graph, 0: the network alone; default: the bundle's"""
    filter: NotRequired[str | None]
    """only items that pass, such as price < 50 and brand in ["A", "B"]; docs/FILTERS.md has all"""
    boost: NotRequired[list[Boost] | None]
    """what to recommend more or less of"""
    timeout_ms: NotRequired[float | None]
    """time budget"""
    k: NotRequired[int]
    """how many items to return"""
    beam_width: NotRequired[int | None]
    """at least k; default: the larger of k and the service's default"""
    exclude_seen: NotRequired[bool]
    """never recommend items of the history"""
    allow: NotRequired[list[str] | None]
    """recommend only these"""
    deny: NotRequired[list[str]]
    """never recommend these"""
    categories: NotRequired[list[str]]
    """recommend only items in at least one of these; empty: no restriction"""
    catalogue: NotRequired[str | None]
    """recommend only items of this named subset"""
    diversity: NotRequired[float]
    """how much the list avoids similar items; it is chosen from all that the beams find"""
    max_per_category: NotRequired[int | None]
    """most items per category; the list is shorter if the beams find no others"""
    rotation: NotRequired[float]
    """how far to move down items that the user was shown recently but did not take (from POST /feedback): 0.5 as if
    half as probable, 1 behind all others"""
    explore: NotRequired[int]
    """slots reserved for new items, which nobody had when the model was trained, the model's best first; if there are
    fewer, other items fill the list"""
    reasoning_steps: NotRequired[int | Literal["auto"] | None]
    """default: the model's default"""
    name: str


class PopularResponse(TypedDict):
    model_version: str
    window: Literal["hour"] | Literal["day"] | Literal["week"] | Literal["month"]
    items: list[RecommendedItem]
    """best first; score: events in the window or, of trending items, by how many standard deviations they exceed what
    their past predicts; 0: by the bundle's popularity"""
    events: float
    """events in the window, on all items; older events count less"""
    shared: bool
    """whether all processes count together; false: the one that answered counts its own"""
    unknown_items: list[str]
    """ids in allow or deny that are not in the catalogue"""


class Problem(TypedDict):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    field: NotRequired[str | None]
    position: NotRequired[int | None]
    """position of the character at which a filter is wrong, the first being 1"""
    errors: NotRequired[list[dict[str, str]] | None]
    """all invalid fields, if there are several"""
    retry_after: NotRequired[int | None]
    """seconds"""


class PutItem(TypedDict):
    title: NotRequired[str | None]
    brand: NotRequired[str | None]
    categories: NotRequired[list[str]]
    description: NotRequired[str | None]
    fields: NotRequired[dict[str, str | float | bool | list[str]]]
    """other attributes, for filters: numbers, strings, booleans, lists; ISO 8601 strings are times"""
    available_from: NotRequired[str | None]
    """not recommended before this time"""
    available_until: NotRequired[str | None]
    """not recommended from this time on"""
    item_id: str


class RankRequest(TypedDict):
    """The user, their history, and the items to put in order for them."""

    reasoning_paths: NotRequired[int | None]
    """reasoning paths searched in parallel; default: the bundle's"""
    dense_weight: NotRequired[float | None]
    """weight of the dense score; default: the bundle's"""
    neighbours_weight: NotRequired[float | None]
    """weight of the item graph, 0: the network alone; default: the bundle's"""
    filter: NotRequired[str | None]
    """only items that pass, such as price < 50 and brand in ["A", "B"]; docs/FILTERS.md has all"""
    boost: NotRequired[list[Boost] | None]
    """what to recommend more or less of"""
    timeout_ms: NotRequired[float | None]
    """time budget"""
    user_id: NotRequired[str | None]
    """without it nothing is cached and no known history is used"""
    history: NotRequired[list[str | HistoryEvent] | None]
    """item ids and events, oldest first, as given; omitted or empty: the known history"""
    explain: NotRequired[bool]
    items: list[str]
    """item ids; each is scored, including seen ones, and returned once"""


class Rate(TypedDict):
    """A share with its 95% confidence interval (Wilson)."""

    share: float
    low: float
    high: float


class ReasoningStep(TypedDict):
    """The model's state before any reasoning (step 0) or after a reasoning step."""

    step: int
    token: NotRequired[int | None]
    """vocabulary id; null at step 0, or if steps have no tokens"""
    log_probability: NotRequired[float | None]
    nearest_items: list[NamedItem]


class RecommendRequest(TypedDict):
    """The user, their history, and what may be recommended to them."""

    reasoning_paths: NotRequired[int | None]
    """reasoning paths searched in parallel; default: the bundle's"""
    dense_weight: NotRequired[float | None]
    """weight of the dense score; default: the bundle's"""
    neighbours_weight: NotRequired[float | None]
    """weight of the item graph, 0: the network alone; default: the bundle's"""
    filter: NotRequired[str | None]
    """only items that pass, such as price < 50 and brand in ["A", "B"]; docs/FILTERS.md has all"""
    boost: NotRequired[list[Boost] | None]
    """what to recommend more or less of"""
    timeout_ms: NotRequired[float | None]
    """time budget"""
    user_id: NotRequired[str | None]
    """without it nothing is cached and no known history is used"""
    history: NotRequired[list[str | HistoryEvent] | None]
    """item ids and events, oldest first, as given; omitted or empty: the known history"""
    explain: NotRequired[bool]
    k: NotRequired[int]
    """how many items to return"""
    beam_width: NotRequired[int | None]
    """at least k; default: the larger of k and the service's default"""
    exclude_seen: NotRequired[bool]
    """never recommend items of the history"""
    allow: NotRequired[list[str] | None]
    """recommend only these"""
    deny: NotRequired[list[str]]
    """never recommend these"""
    categories: NotRequired[list[str]]
    """recommend only items in at least one of these; empty: no restriction"""
    catalogue: NotRequired[str | None]
    """recommend only items of this named subset"""
    diversity: NotRequired[float]
    """how much the list avoids similar items; it is chosen from all that the beams find"""
    max_per_category: NotRequired[int | None]
    """most items per category; the list is shorter if the beams find no others"""
    rotation: NotRequired[float]
    """how far to move down items that the user was shown recently but did not take (from POST /feedback): 0.5 as if
    half as probable, 1 behind all others"""
    explore: NotRequired[int]
    """slots reserved for new items, which nobody had when the model was trained, the model's best first; if there are
    fewer, other items fill the list"""
    scenario: NotRequired[str | None]
    """name of a preset for all that this request leaves out"""
    after: NotRequired[str | None]
    """recommendation_id of the previous page, which this answer continues. Send everything else as for that page; all
    pages together have at most as many items as the widest permitted beam"""


class RecommendResponse(TypedDict):
    """The answer to one request."""

    recommendation_id: str
    user_id: str | None
    model_version: str
    source: Literal["model"] | Literal["popularity"]
    reasoning_steps: int
    reasoning_paths: int
    beam_width: int
    """0 if given items were ranked, since nothing was searched for"""
    cache: Literal["memory"] | Literal["redis"] | Literal["miss"] | Literal["off"]
    items: list[RecommendedItem]
    """best first, distinct"""
    unknown_items: list[str]
    """ids in history, allow or deny that are not in the catalogue; removed items in allow or deny (a history still uses
    them); items that could not be ranked"""
    timings_ms: Timings
    explanation: NotRequired[Explanation | None]


class RecommendedItem(TypedDict):
    """One item of an answer."""

    item_id: str
    score: float
    title: NotRequired[str | None]
    categories: NotRequired[list[str]]


class Scenario(TypedDict):
    """A preset for requests that name it. What a request sets itself takes precedence."""

    reasoning_paths: NotRequired[int | None]
    """reasoning paths searched in parallel; default: the bundle's"""
    dense_weight: NotRequired[float | None]
    """weight of the dense score; default: the bundle's"""
    neighbours_weight: NotRequired[float | None]
    """weight of the item graph, 0: the network alone; default: the bundle's"""
    filter: NotRequired[str | None]
    """only items that pass, such as price < 50 and brand in ["A", "B"]; docs/FILTERS.md has all"""
    boost: NotRequired[list[Boost] | None]
    """what to recommend more or less of"""
    timeout_ms: NotRequired[float | None]
    """time budget"""
    k: NotRequired[int]
    """how many items to return"""
    beam_width: NotRequired[int | None]
    """at least k; default: the larger of k and the service's default"""
    exclude_seen: NotRequired[bool]
    """never recommend items of the history"""
    allow: NotRequired[list[str] | None]
    """recommend only these"""
    deny: NotRequired[list[str]]
    """never recommend these"""
    categories: NotRequired[list[str]]
    """recommend only items in at least one of these; empty: no restriction"""
    catalogue: NotRequired[str | None]
    """recommend only items of this named subset"""
    diversity: NotRequired[float]
    """how much the list avoids similar items; it is chosen from all that the beams find"""
    max_per_category: NotRequired[int | None]
    """most items per category; the list is shorter if the beams find no others"""
    rotation: NotRequired[float]
    """how far to move down items that the user was shown recently but did not take (from POST /feedback): 0.5 as if
    half as probable, 1 behind all others"""
    explore: NotRequired[int]
    """slots reserved for new items, which nobody had when the model was trained, the model's best first; if there are
    fewer, other items fill the list"""
    reasoning_steps: NotRequired[int | Literal["auto"] | None]
    """default: the model's default"""


class ScenariosResponse(TypedDict):
    scenarios: list[NamedScenario]


class ServerMetadata(TypedDict):
    name: str
    version: str
    extensions: list[str]


class ShadowBody(TypedDict):
    """A model that also searches for requests, but whose answers nobody gets."""

    version: str
    percent: NotRequired[float]
    """share of the requests, drawn at random"""


class SimilarItem(TypedDict):
    item_id: str
    title: str | None
    categories: list[str]
    by: Literal["together"] | Literal["content"]
    score: float
    """together: this item's share of what follows or resembles the other; content: cosine similarity"""


class SimilarResponse(TypedDict):
    item_id: str
    model_version: str
    items: list[SimilarItem]
    """best first; if there are both kinds, those taken together come first"""
    unknown_items: list[str]
    """ids in allow or deny that are not in the catalogue"""


class StepsFigures(TypedDict):
    """The accuracy of a number of reasoning steps, measured at export, and its time on this machine. null: not
    measured."""

    reasoning_steps: int
    auto: bool
    """whether `reasoning_steps=auto` may take this many"""
    users: int | None
    """validation users that accuracy was measured on"""
    of: int | None
    """all validation users, of whom these were drawn"""
    recall_at_10: float | None
    ndcg_at_10: float | None
    gain: float | None
    """in NDCG@10 over 0 steps, on the same users"""
    gain_low: float | None
    """lower end of the gain's 95% interval over users"""
    gain_high: float | None
    """upper end of it"""
    detectable: float | None
    """smallest true gain that this many users show with 80% power"""
    median_ms: float | None
    """of recent searches that were alone in their batch, with the default beam width"""


class Tensor(TypedDict):
    name: str
    datatype: str
    shape: list[int]
    """-1: of any length"""


class Timings(TypedDict):
    """Milliseconds. `encode`, `reason` and `decode` are those of the batch that the request was in. `reason` is not 0
    with 0 steps: the first pass of the decoder, which every answer needs, counts as reasoning."""

    queue: NotRequired[float]
    cache: NotRequired[float]
    encode: NotRequired[float]
    reason: NotRequired[float]
    decode: NotRequired[float]
    total: NotRequired[float]


class TrafficBody(TypedDict):
    name: NotRequired[str]
    """name of the experiment; another name assigns the users anew"""
    arms: NotRequired[list[ArmBody]]
    """at most 100% in total; the other users get the active model"""
    shadow: NotRequired[ShadowBody | None]


class TrafficResponse(TypedDict):
    name: NotRequired[str]
    """name of the experiment; another name assigns the users anew"""
    arms: NotRequired[list[ArmBody]]
    """at most 100% in total; the other users get the active model"""
    shadow: NotRequired[ShadowBody | None]
    active: str


class UserResponse(TypedDict):
    user_id: str
    items: list[str | HistoryEvent]
    """the known history, oldest first, as it was sent"""
    cached: list[str]
    """the cache tiers that hold an encoded history"""
    shown: list[str]
    """items shown recently but not taken, oldest first; kept for `rotation`"""
    feedback: int
    """how many records of feedback on the user's recommendations are kept for training"""
