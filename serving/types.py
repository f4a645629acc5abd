"""The data that flows through serving, and the letters used for shapes everywhere.

Shape legend (capital letters in docstrings and comments mean these, unless a docstring gives one another meaning):

    B  requests in a batch        K  beams per request            S  history tokens
    L  reasoning steps            P  reasoning paths              M  item levels (tokens per item)
    V  size of the vocabulary     C  codes of a level             D  width of the model
    H  attention heads            N  nodes of the trie            I  items of the catalogue
    Q  decoder rows per request   W  slots of the decoder cache   E  width of an embedding
    U  users, in training

An *item* inside serving is its row in the catalogue (int); item ids (strings) are found at the edges only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:  # takes seconds to import, which callers that only need the other names should not pay
    import torch

EncoderAttention = Literal["bidirectional", "causal-by-item"]
StepForm = Literal["token", "state", "both"]
Merge = Literal["logsumexp", "max"]
Normalise = Literal["block", "vocabulary"]
RuntimeName = Literal["eager", "onnx", "onnx-int8", "cuda"]
StateDtype = Literal["float32", "float16"]
AnsweredBy = Literal["model", "popularity"]  # what chose the items of a list
StateFrom = Literal["memory", "redis", "miss", "off"]  # where an encoder state was found
AlikeBy = Literal["together", "content"]  # in what way two items are similar (serving/online/similar.py)

NEG_INF = float("-inf")  # the score of what may not be, and the bias of what is not attended to

# Characters (code points) of a user's or an item's id: what can be trained can be sent over HTTP and scored offline.
MAX_ID_LENGTH = 256
MAX_TYPE_LENGTH = 64  # characters of an event's type
MAX_TIMESTAMP = 1e11  # seconds since 1970 of an event: year 5138, so that milliseconds are noticed
MAX_BOOSTS = 4  # of a request
REDIS_PREFIX = "streamrec"  # of every key and channel, unless the settings name another


GATE_FEATURES = ("support", "peak", "entropy", "length", "confidence")


@dataclass(frozen=True, slots=True)
class Event:
    """What somebody did with an item. timestamp: seconds since 1970. An item id alone is an event of which nothing else
    is known."""

    item_id: str
    type: str | None = None
    value: float | None = None
    timestamp: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class EventData:
    """What the model reads of a history's n events besides their items, oldest first.

    weights: (n,) float32, how much each counts in the item memory. times: (n,) float64, seconds since 1970, NaN where
    unknown; None: nobody reads them.
    """

    weights: np.ndarray
    times: np.ndarray | None = None

    def of(self, index: Any) -> EventData:
        """Those of some events."""
        return EventData(self.weights[index], None if self.times is None else self.times[index])


@dataclass(frozen=True, slots=True)
class Gate:
    """How network and item memory are mixed: log odds of the network = intercept + sum of coefficient * feature.

    support, peak, entropy: log of the sum of n over all items, largest share, and entropy of the shares in nats
    (`serving/items/neighbours.py`). length: log of the number of history items that are read. confidence: log
    probability of the likeliest first token of an item, after the likeliest reasoning path. network_power,
    memory_power: the exponents of the two probabilities, above 0 (`serving/search/memory.py`).
    """

    intercept: float
    support: float = 0.0
    peak: float = 0.0
    entropy: float = 0.0
    length: float = 0.0
    confidence: float = 0.0
    network_power: float = 1.0
    memory_power: float = 1.0

    @property
    def coefficients(self) -> dict[str, float]:
        """Of the features, by name."""
        return {name: getattr(self, name) for name in GATE_FEATURES}


@dataclass(frozen=True, slots=True)
class Ages:
    """How a network tells a history's items apart by age, the newest being of age 0.

    number: of ages that it knows; 0: none, as in T5. suffix: tokens that follow the items and are of age 0.
    """

    number: int = 0
    suffix: int = 0


@dataclass(frozen=True, slots=True)
class BundleSettings:
    """Everything that decides what an answer is, apart from the weights.

    max_items: history items that the encoder reads. suffix_tokens: ids after the history. paths: reasoning paths kept.
    dense_candidates: how many items, those with the highest dense and neighbour scores, join those that the beam finds.
    gate: how the item memory is mixed with the network; None: its log score is added, as in older bundles.
    neighbours_weight: multiplies the memory's odds against the network, or, without a gate, its log score; 0: off.
    normalise: what a token's softmax runs over, the tokens that may stand at its position or the whole vocabulary, as
    in older bundles.
    age_bias: whether the decoder's cross-attention has a bias per age of an item, 0..max_items - 1 (heads.safetensors).
    time_bias: whether it has one by how long before the newest event an item's was (heads.safetensors).
    item_input: whether the encoder reads a vector of each item beside its tokens (heads.safetensors).
    type_weights: how much events of a type count in the item memory, 1 where a type is not named; those of weight 0 are
    left out of histories.
    """

    max_items: int = 20
    suffix_tokens: tuple[int, ...] = ()
    default_steps: int = 0
    step_form: StepForm = "token"
    paths: int = 1
    merge: Merge = "logsumexp"
    temperature: float = 1.0
    dense_weight: float = 0.0
    dense_candidates: int = 0
    neighbours_weight: float = 0.0
    gate: Gate | None = None
    attention: EncoderAttention = "bidirectional"
    normalise: Normalise = "vocabulary"
    age_bias: bool = False
    time_bias: bool = False
    item_input: bool = False
    type_weights: tuple[tuple[str, float], ...] = ()

    @property
    def ages(self) -> Ages:
        return Ages(self.max_items if self.age_bias else 0, len(self.suffix_tokens))


@dataclass(frozen=True, slots=True)
class Rules:
    """What a request permits, combined freely: an item must pass every rule that is set.

    exclude, deny: catalogue rows that must not be recommended (seen items, a deny list). allow: only these rows.
    categories: only items in at least one of these. catalogue: only items of this named subset. new_only: only items
    that nobody had when the model was trained (`Catalogue.is_new`). filters: only items that pass all of these
    (docs/FILTERS.md), in which `now` stands for this time, in seconds since 1970.
    """

    exclude: tuple[int, ...] = ()
    deny: tuple[int, ...] = ()
    allow: tuple[int, ...] | None = None
    categories: tuple[str, ...] = ()
    catalogue: str | None = None
    new_only: bool = False
    filters: tuple[str, ...] = ()
    now: float = 0.0


@dataclass(frozen=True, slots=True)
class Boost:
    """Adds log_factor to the log scores of the items that the rules permit, or, if it is below 0, of all others.

    rules: filters only. Said so, an item does best to be permitted, whichever way the boost goes.
    """

    rules: Rules
    log_factor: float


@dataclass(slots=True)
class Request:
    """One search. history: catalogue rows, oldest first. paths: reasoning paths. None: the bundle's own value.

    items: score these distinct catalogue rows and search for none; beams and rules have no say then. explore: how many
    new items to find besides, by a second search of as many beams. events: of the history; None: nothing is known of
    them. boosts: at most MAX_BOOSTS.
    """

    history: tuple[int, ...]
    k: int
    beam_width: int
    reasoning_steps: int
    rules: Rules = Rules()
    dense_weight: float | None = None
    neighbours_weight: float | None = None
    explain: bool = False
    paths: int | None = None
    items: tuple[int, ...] | None = None
    explore: int = 0
    events: EventData | None = None
    boosts: tuple[Boost, ...] = ()

    @property
    def beam_rows(self) -> int:
        return self.beam_width * searches_of(self.explore)


def searches_of(explore: int) -> int:
    """How many searches a request makes that explores, or does not."""
    return 2 if explore else 1


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """What the search needs to know of a bundle.

    start_tokens[l] starts a search with l steps. reasoning_range: [lo, hi) of the tokens a step may choose;
    level_ranges: of those at each level of an item. paths: P, the reasoning paths kept. merge: how paths are merged at
    the first item token. dense_candidates, normalise, gate: see `BundleSettings`.
    """

    start_tokens: tuple[int, ...]
    reasoning_range: tuple[int, int]
    level_ranges: tuple[tuple[int, int], ...]
    temperature: float = 1.0
    paths: int = 1
    merge: Merge = "logsumexp"
    dense_candidates: int = 0
    normalise: Normalise = "vocabulary"
    gate: Gate | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """How an answer came about, along the reasoning path of its best item."""

    reasoning_tokens: list[int]  # vocabulary ids, length L; empty if steps have no token
    reasoning_log_probs: list[float]  # length L
    nearest_items: list[list[int]]  # per step 0..L the items nearest to the state s_i
    token_log_probs: list[list[float]]  # per returned item, length M
    dense_scores: list[float]  # per returned item, log-softmax of the dense score
    # Per returned item, log score by neighbours, or with a gate the log of its share (None: no share); empty where the
    # bundle has no neighbours.
    neighbour_scores: list[float | None]
    gate: float | None  # the probability of the network in the mixture with the memory; None: there is no mixture
    similarity: list[list[float]]  # per returned item, cosine of s_i and the item per step 0..L


@dataclass(slots=True)
class Answer:
    """Items (catalogue rows, distinct), best first, with their scores, and the seconds spent per stage.

    trace: along the reasoning path of the item that came first in the search.
    """

    items: list[int]
    scores: list[float]
    seconds: dict[str, float] = field(default_factory=dict)  # encode, reason, decode
    trace: Trace | None = None

    def select(self, indices: Sequence[int]) -> Answer:
        """Some of the items, in the order of their indices."""
        trace = self.trace
        if trace is not None:
            trace = replace(
                trace,
                token_log_probs=[trace.token_log_probs[i] for i in indices],
                dense_scores=[trace.dense_scores[i] for i in indices],
                neighbour_scores=[trace.neighbour_scores[i] for i in indices] if trace.neighbour_scores else [],
                similarity=[trace.similarity[i] for i in indices],
            )
        return Answer([self.items[i] for i in indices], [self.scores[i] for i in indices], self.seconds, trace)

    def followed_by(self, other: Answer) -> Answer:
        """These items, then those of another answer to the same history that are not among them."""
        known = set(self.items)
        other = other.select([i for i, item in enumerate(other.items) if item not in known])
        trace = self.trace
        if trace is not None and other.trace is not None:
            trace = replace(
                trace,
                token_log_probs=trace.token_log_probs + other.trace.token_log_probs,
                dense_scores=trace.dense_scores + other.trace.dense_scores,
                neighbour_scores=trace.neighbour_scores + other.trace.neighbour_scores,
                similarity=trace.similarity + other.trace.similarity,
            )
        return Answer(self.items + other.items, self.scores + other.scores, self.seconds, trace)


@dataclass(frozen=True, slots=True)
class SampleAnswer:
    """What a model answered when it was exported: items to a history, both as ids, after so many reasoning steps."""

    history: list[str]  # oldest first
    steps: int
    items: list[str]  # best first


@dataclass(frozen=True, slots=True)
class EncoderState:
    """One encoded history. Shape: (S, D), float32 or float16, on the CPU. Cached per user.

    float32 by default: a score must be within 1e-4 of its definition, and rounding states to float16 moves most of the
    demo bundle's scores by more, some by 1e-3 (`python -m benchmarks.engine.cache`). With 20 items a state takes 20 to
    40 KB, half of that in float16.
    """

    hidden: np.ndarray

    @property
    def nbytes(self) -> int:
        return int(self.hidden.nbytes)


@dataclass(frozen=True, slots=True)
class Beams:
    """The result of a search on the device, best first per request.

    items: (B, K) int64, catalogue rows, -1 where fewer permitted items exist. scores: (B, K) float32, -inf there.
    states: (B, P, L + 1, D) float32. reasoning_tokens, reasoning_log_probs: (B, P, L). path: (B, K) int64, the
    reasoning path that the item continues. token_log_probs: (B, K, M). dense: (B, K). gate: (B,) float32, log odds of
    the network in its mixture with the item memory; inf where it answers alone.
    """

    items: torch.Tensor
    scores: torch.Tensor
    states: torch.Tensor
    reasoning_tokens: torch.Tensor
    reasoning_log_probs: torch.Tensor
    path: torch.Tensor
    token_log_probs: torch.Tensor
    dense: torch.Tensor
    gate: torch.Tensor

    def to(self, device: torch.device | str) -> Beams:
        return Beams(*(getattr(self, field.name).to(device) for field in fields(self)))
