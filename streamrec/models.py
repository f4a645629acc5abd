"""What the service takes and answers, as types of dictionaries.

Written by `make clients` from the OpenAPI document; do not edit."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict


class ArmBody(TypedDict):
    """A share of the users, and what answers them."""

    version: str
    percent: float
    reasoning_steps: NotRequired[int | None]
    """of requests that name none; default: the model's default"""


class BatchRequest(TypedDict):
    """Each request is validated on its own, so that an invalid one does not affect the others."""

    requests: list[RecommendRequest]


class BatchResponse(TypedDict):
    results: list[RecommendResponse | Problem]
    """in the order of the requests"""


class Boost(TypedDict):
    """Multiplies what the items that pass are worth: their score is that of the model + log(factor)."""

    filter: str
    factor: float
    """above 1 for more of them, below for fewer"""


class CatalogueFilter(TypedDict):
    """A named subset as whatever passes a filter, now and as items and times change."""

    filter: str


class CatalogueItems(TypedDict):
    """A named subset as a list."""

    items: list[str]
    """those that the catalogue does not have are ignored"""


class CataloguesResponse(TypedDict):
    """The live catalogue of the active model, as this process has it."""

    version: str
    """of the model"""
    position: str
    """of the last change applied: equal where all have applied the same"""
    items: int
    """items that may be recommended"""
    lag_seconds: float
    """since this process last knew that it has applied every change"""
    durable: bool
    """whether changes outlive a restart"""
    catalogues: list[NamedCatalogue]


class ChangedItem(TypedDict):
    """An item that is not as the model's bundle has it, by its last change."""

    item_id: str
    title: str | None
    change: Literal["added"] | Literal["changed"] | Literal["removed"]
    """added: the bundle has no such item; changed: it has; removed: in no answer"""
    changed_at: str | None
    """null where the log of changes has no time"""
    available_from: str | None
    available_until: str | None


class ChangedItems(TypedDict):
    position: str
    """of the last change that is in the list, as GET /catalogues has it"""
    items: list[ChangedItem]
    """the one that changed last first, each once"""
    next: int | None
    """what `after` takes to go on behind these; null at the end"""


class Cost(TypedDict):
    """Measured time of a batch of one shape on this machine."""

    reasoning_steps: int
    beam_rows: int
    """the beam widths of the batch's searches, added up"""
    median_ms: float
    p95_ms: float
    runs: int
    """how many recent runs this is measured from"""


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
    """seconds since the epoch; default: when the request came"""


class FeedbackResponse(TypedDict):
    counted: bool
    """false: this event on this item of this recommendation had been counted before"""
    position: int
    """of the item in the list, 1 for the best; pages count on"""
    kept: bool
    """whether it can be trained on later; false: it is only counted"""


class FeedbackSummaries(TypedDict):
    summaries: list[FeedbackSummary]


class FeedbackSummary(TypedDict):
    """Of one model, source and number of steps, since the start of this service."""

    version: str
    source: str
    reasoning_steps: int
    recommendations: int
    events: dict[str, int]
    hit_rate: Rate | None
    """recommendations with any event but impressions; null without any"""
    click_through_rate: Rate | None
    """clicks per impression; null without impressions"""


class HistoryEvent(TypedDict):
    """What somebody did with an item; its id alone stands for an event of which nothing else is known."""

    item_id: str
    type: NotRequired[str | None]
    """such as view or purchase; a model may give types weights, and leave some out"""
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
    """All that is known of an item. Its text (title, brand, categories, description) gives a new item its place."""

    title: NotRequired[str | None]
    brand: NotRequired[str | None]
    categories: NotRequired[list[str]]
    description: NotRequired[str | None]
    fields: NotRequired[dict[str, str | float | bool | list[str]]]
    """what else is known, for filters: numbers, strings, booleans, lists; ISO 8601 strings are times"""
    available_from: NotRequired[str | None]
    """before, it is never recommended"""
    available_until: NotRequired[str | None]
    """from then on, neither"""


class ItemsPut(TypedDict):
    results: list[Item | Problem]
    """one for each item of the request, in its order"""


class ItemsRequest(TypedDict):
    items: list[PutItem]


class ItemsResponse(TypedDict):
    items: list[Item]


class Model(TypedDict):
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
    accuracy: list[dict[str, Any]]
    """measured at export, per number of reasoning steps"""
    cost: list[Cost]
    """measured on this machine, since the start"""
    by_steps: list[StepsFigures]
    """both for every number of reasoning steps, 0 first"""


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
    """listed items in it"""
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
    """what to recommend more of, or less"""
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
    """how much a list avoids items like each other, chosen from all that the beams find"""
    max_per_category: NotRequired[int | None]
    """most items of any one category; the list is shorter where the beams find no others"""
    rotation: NotRequired[float]
    """how far items go down that the user was shown lately and did not take, as POST /feedback says: at 0.5 as if half
    as probable, at 1 behind all others"""
    explore: NotRequired[int]
    """slots kept for new items, which nobody had when the model was trained, the model's best first; where there are
    fewer, others fill the list"""
    reasoning_steps: NotRequired[int | Literal["auto"] | None]
    """default: the model's default"""
    name: str


class PopularResponse(TypedDict):
    model_version: str
    window: Literal["hour"] | Literal["day"] | Literal["week"] | Literal["month"]
    items: list[RecommendedItem]
    """best first; score: events in the window, or how far they are above what was to be expected, in standard
    deviations; 0: by the bundle's popularity"""
    events: float
    """in the window, on all items; an event counts less the older it is"""
    shared: bool
    """false: counted by the process that answered, and no other"""
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
    """of the character at which a filter is wrong, the first being 1"""
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
    """what else is known, for filters: numbers, strings, booleans, lists; ISO 8601 strings are times"""
    available_from: NotRequired[str | None]
    """before, it is never recommended"""
    available_until: NotRequired[str | None]
    """from then on, neither"""
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
    """what to recommend more of, or less"""
    timeout_ms: NotRequired[float | None]
    """time budget"""
    user_id: NotRequired[str | None]
    """without it nothing is cached and no known history is used"""
    history: NotRequired[list[str | HistoryEvent] | None]
    """item ids and events, oldest first, as given; omitted or empty: the known history"""
    explain: NotRequired[bool]
    items: list[str]
    """item ids; each is scored, seen ones too, and comes back once"""


class Rate(TypedDict):
    """A share, with the 95% interval that its number of cases leaves (Wilson)."""

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
    """what to recommend more of, or less"""
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
    """how much a list avoids items like each other, chosen from all that the beams find"""
    max_per_category: NotRequired[int | None]
    """most items of any one category; the list is shorter where the beams find no others"""
    rotation: NotRequired[float]
    """how far items go down that the user was shown lately and did not take, as POST /feedback says: at 0.5 as if half
    as probable, at 1 behind all others"""
    explore: NotRequired[int]
    """slots kept for new items, which nobody had when the model was trained, the model's best first; where there are
    fewer, others fill the list"""
    scenario: NotRequired[str | None]
    """name of a preset of all that this request leaves out"""
    after: NotRequired[str | None]
    """recommendation_id of the page before: this answer goes on behind it. Send all else as for that page; all pages
    together have at most as many items as the widest beam permitted"""


class RecommendResponse(TypedDict):
    """The answer to one request."""

    recommendation_id: str
    user_id: str | None
    model_version: str
    source: Literal["model"] | Literal["popularity"]
    reasoning_steps: int
    reasoning_paths: int
    beam_width: int
    """0 if given items were ranked: nothing was searched for then"""
    cache: Literal["memory"] | Literal["redis"] | Literal["miss"] | Literal["off"]
    items: list[RecommendedItem]
    """best first, distinct"""
    unknown_items: list[str]
    """ids in history, allow or deny that are not in the catalogue; items that could not be ranked"""
    timings_ms: Timings
    explanation: NotRequired[Explanation | None]


class RecommendedItem(TypedDict):
    """One item of an answer."""

    item_id: str
    score: float
    title: NotRequired[str | None]
    categories: NotRequired[list[str]]


class Scenario(TypedDict):
    """A preset of requests that name it. What a request says itself wins."""

    reasoning_paths: NotRequired[int | None]
    """reasoning paths searched in parallel; default: the bundle's"""
    dense_weight: NotRequired[float | None]
    """weight of the dense score; default: the bundle's"""
    neighbours_weight: NotRequired[float | None]
    """weight of the item graph, 0: the network alone; default: the bundle's"""
    filter: NotRequired[str | None]
    """only items that pass, such as price < 50 and brand in ["A", "B"]; docs/FILTERS.md has all"""
    boost: NotRequired[list[Boost] | None]
    """what to recommend more of, or less"""
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
    """how much a list avoids items like each other, chosen from all that the beams find"""
    max_per_category: NotRequired[int | None]
    """most items of any one category; the list is shorter where the beams find no others"""
    rotation: NotRequired[float]
    """how far items go down that the user was shown lately and did not take, as POST /feedback says: at 0.5 as if half
    as probable, at 1 behind all others"""
    explore: NotRequired[int]
    """slots kept for new items, which nobody had when the model was trained, the model's best first; where there are
    fewer, others fill the list"""
    reasoning_steps: NotRequired[int | Literal["auto"] | None]
    """default: the model's default"""


class ScenariosResponse(TypedDict):
    scenarios: list[NamedScenario]


class ServerMetadata(TypedDict):
    name: str
    version: str
    extensions: list[str]


class ShadowBody(TypedDict):
    """A model that searches for requests as well, and whose answers nobody gets."""

    version: str
    percent: NotRequired[float]
    """of the requests, drawn by chance"""


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
    """best first; where both kinds are there, those taken together first"""
    unknown_items: list[str]
    """ids in allow or deny that are not in the catalogue"""


class StepsFigures(TypedDict):
    """What a number of reasoning steps gives, as measured at export, and what it takes on this machine. null: not
    measured."""

    reasoning_steps: int
    auto: bool
    """whether `reasoning_steps=auto` may take so many"""
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
    """smallest true gain that so many users show with 80% power"""
    median_ms: float | None
    """of recent searches alone in their batch, with the default beam width"""


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
    """of the experiment; another name deals the users out anew"""
    arms: NotRequired[list[ArmBody]]
    """at most 100% together; the rest of the users gets the active model"""
    shadow: NotRequired[ShadowBody | None]


class TrafficResponse(TypedDict):
    name: NotRequired[str]
    """of the experiment; another name deals the users out anew"""
    arms: NotRequired[list[ArmBody]]
    """at most 100% together; the rest of the users gets the active model"""
    shadow: NotRequired[ShadowBody | None]
    active: str


class UserResponse(TypedDict):
    user_id: str
    items: list[str | HistoryEvent]
    """the known history, oldest first, as it was sent"""
    cached: list[str]
    """the cache tiers that hold an encoded history"""
    shown: list[str]
    """items shown lately and not taken, oldest first; kept for rotation"""
