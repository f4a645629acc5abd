"""The definition of an answer in slow, plain Python: float64, no cache, one prefix at a time. Tests compare with it.

Lists and dictionaries instead of tensors of beams; for small catalogues only.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from serving.bundle import Bundle
from serving.items.events import TIME_BUCKETS
from serving.items.histories import history_tokens
from serving.network.model import dense_logits
from serving.types import EventData

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Path:
    """A reasoning path: its tokens (zeros if only the state is fed back), log-probability and states s_0 .. s_l."""

    tokens: Tokens
    log_prob: float
    states: tuple[torch.Tensor, ...]  # each (D,)


class Reference:
    """Scores items and searches for one history. steps: l, the number of reasoning steps."""

    def __init__(self, bundle: Bundle, history: Sequence[int], steps: int, events: EventData | None = None) -> None:
        self.bundle, self.settings, self.steps = bundle, bundle.settings, steps
        self.history = list(history)[-self.settings.max_items :]
        if events is not None:
            events = events.of(slice(-self.settings.max_items, None))
        self.weights = [1.0] * len(self.history) if events is None else events.weights.tolist()
        self.network = copy.deepcopy(bundle.network).double().eval()
        self.items: list[Tokens] = [tuple(row) for row in bundle.catalogue.tokens.tolist()]
        tokens, mask = history_tokens(
            [history], bundle.catalogue.tokens, self.settings.max_items, self.settings.suffix_tokens
        )
        per_item = len(self.items[0])
        items = torch.tensor([self.history], dtype=torch.int64) if self.settings.item_input else None
        hidden = self.network.encode(tokens, mask, self.settings.attention, per_item, items)
        self.cross = self.network.cross_keys_values(hidden, mask, per_item, self._buckets(events, tokens.shape[1]))

    def _buckets(self, events: EventData | None, width: int) -> torch.Tensor | None:
        """Of the time from each event to the newest whose time is known."""
        if events is None or events.times is None:
            return None
        times = events.times.tolist()
        known = [time for time in times if not math.isnan(time)]
        buckets = [0 if math.isnan(time) else (1 + int(max(known[-1] - time, 0))).bit_length() for time in times]
        return torch.tensor([buckets + [0] * (width - len(times))]).clamp(max=TIME_BUCKETS - 1)

    @torch.no_grad()
    def paths(self) -> list[Path]:
        """The reasoning paths that a search keeps, the likeliest first."""
        lo, hi = self.bundle.vocabulary.reasoning_range
        paths = [self.path(())]
        for _ in range(self.steps):
            if self.settings.step_form == "state":
                paths = [self.path((*paths[0].tokens, 0))]
                continue
            grown: dict[Tokens, float] = {}
            for path in paths:
                log_probs = self._log_probs(path, ())
                grown |= {(*path.tokens, o): path.log_prob + float(log_probs[o]) for o in range(lo, hi)}
            best = sorted(grown, key=lambda tokens: -grown[tokens])[: self.settings.paths]
            paths = [self.path(tokens) for tokens in best]
        return paths

    @torch.no_grad()
    def path(self, tokens: Tokens) -> Path:
        """The reasoning path with these tokens, step by step from the start token."""
        path = Path((), 0.0, ())
        path = replace(path, states=(self._state(path),))
        for token in tokens:
            log_prob = 0.0 if self.settings.step_form == "state" else float(self._log_probs(path, ())[token])
            longer = replace(path, tokens=(*path.tokens, token), log_prob=path.log_prob + log_prob)
            path = replace(longer, states=(*path.states, self._state(longer)))
        return path

    @torch.no_grad()
    def score(self, path: Path, item: Tokens) -> float:
        """sum over the item's tokens of log P(c_j | path, c_1 .. c_{j-1})  [contract of a bundle]."""
        return sum(float(self._log_probs(path, item[:j])[token]) for j, token in enumerate(item))

    @torch.no_grad()
    def dense(self, path: Path) -> np.ndarray:
        """log-softmax of the final state against every item. Shape: (I,) float64."""
        vectors = self.network.item_vectors(torch.tensor(self.items))
        return dense_logits(path.states[-1], vectors).log_softmax(-1).numpy()

    def shares(self) -> tuple[np.ndarray, float]:
        """share(j) of every item, and the sum of n, as `serving.items.neighbours` defines them. Shape: (I,) float64."""
        graph, n = self.bundle.neighbours, [0.0] * len(self.items)
        if graph is None:
            return np.zeros(len(self.items)), 0.0
        for t, row in enumerate(reversed(self.history)):
            for entry in range(graph.offsets[row], graph.offsets[row + 1]):
                factor = self.weights[-1 - t] * (t + 1) ** -graph.recency
                n[graph.items[entry]] += factor * float(graph.weights[entry])
        n = [max(x, 0.0) for x in n]
        return np.array([x / sum(n) if sum(n) else 0.0 for x in n]), sum(n)

    def neighbours(self) -> np.ndarray:
        """log score of every item, which a bundle without a gate adds to the network's. Shape: (I,) float64."""
        graph = self.bundle.neighbours
        if graph is None or graph.floor is None:
            return np.zeros(len(self.items))
        return np.array([math.log(share + graph.floor) for share in self.shares()[0]])

    @torch.no_grad()
    def network_odds(self, path: Path, weight: float) -> float:
        """g / (1 - g) of `serving.search.memory`; infinite where the network answers alone. path: the likeliest."""
        gate, (share, total) = self.settings.gate, self.shares()
        if gate is None or not total or not weight:
            return math.inf
        first, end = self.bundle.vocabulary.level_ranges[0]
        log_odds = gate.intercept + gate.support * math.log(total) + gate.peak * max(share)
        log_odds += gate.entropy * -sum(x * math.log(x) for x in share if x > 0)
        log_odds += gate.length * math.log(len(self.history))
        log_odds += gate.confidence * float(self._log_probs(path, ())[first:end].max())
        return math.exp(log_odds) / weight

    def joined(self, network: float, row: int, odds: float, weight: float) -> float:
        """The score of an item (a catalogue row) from the network's score of it. odds: of the network."""
        gate, share = self.settings.gate, float(self.shares()[0][row])
        if gate is None:
            return network + weight * float(self.neighbours()[row])
        if odds == math.inf:
            return network
        a, b = gate.network_power, gate.memory_power
        return math.log(odds / (1 + odds) * math.exp(a * network) + share**b / (1 + odds)) / a

    @torch.no_grad()
    def search(
        self,
        beam_width: int,
        permitted: Collection[int],
        dense_weight: float | None = None,
        neighbours_weight: float = 0.0,
    ) -> list[tuple[int, float]]:
        """Items (catalogue rows) and scores, best first, as `serving.search.beam.search` defines them."""
        paths = self.paths()
        rows = {self.items[row]: row for row in permitted}
        beams: dict[Tokens, tuple[float, int]] = {  # prefix -> score and the path that carries it
            (token,): self._first(paths, token) for token in sorted({item[0] for item in rows})
        }
        beams = _cut(beams, beam_width)
        for level in range(1, len(self.items[0])):
            grown: dict[Tokens, tuple[float, int]] = {}
            for prefix, (score, path) in beams.items():
                log_probs = self._log_probs(paths[path], prefix)
                for token in sorted({item[level] for item in rows if item[:level] == prefix}):
                    grown[(*prefix, token)] = (score + float(log_probs[token]), path)
            beams = _cut(grown, beam_width)
        odds = self.network_odds(paths[0], neighbours_weight)
        bonus = neighbours_weight * self.neighbours()
        is_favoured = self.shares()[0] > 0 if neighbours_weight else np.zeros(len(self.items), bool)
        if odds < math.inf:
            bonus = self.shares()[0]
        elif dense_weight:
            bonus = bonus + dense_weight * self.dense(paths[0])
            is_favoured[:] = True
        favoured = [row for row in permitted if is_favoured[row]]
        best = sorted(favoured, key=lambda row: (-bonus[row], row))[: self.settings.dense_candidates]
        found = {rows[item]: scored for item, scored in beams.items()}
        found |= {row: self._scored(paths, self.items[row]) for row in best}
        return self._ranked(paths, found, dense_weight, neighbours_weight)[:beam_width]

    @torch.no_grad()
    def rank(
        self, items: Collection[int], dense_weight: float | None = None, neighbours_weight: float = 0.0
    ) -> list[tuple[int, float]]:
        """The given items (catalogue rows) with the scores that a search gives them, best first."""
        paths = self.paths()
        scored = {row: self._scored(paths, self.items[row]) for row in items}
        return self._ranked(paths, scored, dense_weight, neighbours_weight)

    def _ranked(
        self,
        paths: Sequence[Path],
        scored: dict[int, tuple[float, int]],
        dense_weight: float | None,
        neighbours_weight: float,
    ) -> list[tuple[int, float]]:
        """Lets dense and memory scores join. scored: what an item's tokens score, and the path that it continues."""
        dense = [self.dense(path) if dense_weight else np.zeros(len(self.items)) for path in paths]
        odds = self.network_odds(paths[0], neighbours_weight)
        scores = {}
        for row, (score, path) in scored.items():
            network = score + (dense_weight or 0.0) * float(dense[path][row])
            scores[row] = self.joined(network, row, odds, neighbours_weight)
        order = sorted(scores, key=lambda row: (-scores[row], self.items[row]))
        return [(row, scores[row]) for row in order]

    def _scored(self, paths: Sequence[Path], item: Tokens) -> tuple[float, int]:
        score, path = self._first(paths, item[0])
        rest = (float(self._log_probs(paths[path], item[:j])[item[j]]) for j in range(1, len(item)))
        return score + sum(rest), path

    def _first(self, paths: Sequence[Path], token: int) -> tuple[float, int]:
        """The merged score of an item's first token, and the number of the path that carries it on."""
        shares = torch.tensor([path.log_prob for path in paths], dtype=torch.float64).log_softmax(0).tolist()
        scores = [share + float(self._log_probs(path, ())[token]) for share, path in zip(shares, paths, strict=True)]
        score = max(scores) if self.settings.merge == "max" else math.log(sum(math.exp(x) for x in scores))
        return score, scores.index(max(scores))

    def _state(self, path: Path) -> torch.Tensor:
        """s after a path's last token: MLP_s of the sum of the decoder's outputs so far. Shape: (D,)."""
        state: torch.Tensor = self.network.heads.state(self._decode(self._inputs(path, ())).sum(1))[0]
        return state

    def _log_probs(self, path: Path, prefix: Tokens) -> torch.Tensor:
        """log P(next token | reasoning, prefix of an item). Shape: (V,) float64, -inf where none may be."""
        hidden = self._decode(self._inputs(path, prefix))[0, -1]
        logits = self.network.t5.logits(hidden) / self.settings.temperature
        if self.settings.normalise == "block":
            vocabulary, reasons = self.bundle.vocabulary, len(path.tokens) < self.steps
            first, end = vocabulary.reasoning_range if reasons else vocabulary.level_ranges[len(prefix)]
            token = torch.arange(len(logits))
            logits = logits.masked_fill((token < first) | (token >= end), -math.inf)
        return logits.log_softmax(-1)

    def _inputs(self, path: Path, prefix: Tokens) -> torch.Tensor:
        """The decoder's input: start token of l, reasoning so far, prefix of an item. Shape: (1, T, D), T positions."""
        shared = self.network.t5.shared
        inputs = [shared(torch.tensor([[self.bundle.vocabulary.start_tokens[self.steps]]]))]
        for token, state in zip(path.tokens, path.states, strict=False):
            inputs.append(self.network.step_input(torch.tensor([[token]]), state[None, None]))
        return torch.cat([*inputs, shared(torch.tensor([prefix], dtype=torch.int64))], 1)

    def _decode(self, inputs: torch.Tensor) -> torch.Tensor:
        """All positions at once. Shape: (1, T, D) -> (1, T, D)."""
        t5, at = self.network.t5, torch.arange(inputs.shape[1])
        bias = t5.decoder.position_bias(at, at).masked_fill(at[None, :] > at[:, None], float("-inf"))
        return t5.decode(inputs, bias.unsqueeze(0), self.cross, None)[0]


def score_all_items(
    bundle: Bundle,
    history: Sequence[int],
    reasoning: Tokens | int = (),
    dense_weight: float = 0.0,
    neighbours_weight: float = 0.0,
    events: EventData | None = None,
) -> tuple[np.ndarray, float]:
    """Every item's score after one given reasoning path, and the path's log-probability. Shape: (I,) float64.

    reasoning: the path's tokens; for a model whose steps feed back the state alone, the number of steps.
    """
    tokens = (0,) * reasoning if isinstance(reasoning, int) else tuple(reasoning)
    reference = Reference(bundle, history, len(tokens), events)
    path = reference.path(tokens)
    network = np.array([reference.score(path, item) for item in reference.items]) + dense_weight * reference.dense(path)
    odds = reference.network_odds(path, neighbours_weight)
    scores = [reference.joined(float(score), row, odds, neighbours_weight) for row, score in enumerate(network)]
    return np.array(scores), path.log_prob


def _cut(beams: dict[Tokens, tuple[float, int]], beam_width: int) -> dict[Tokens, tuple[float, int]]:
    """The best prefixes, best first; equal scores by token path, the smaller first."""
    return dict(sorted(beams.items(), key=lambda entry: (-entry[1][0], entry[0]))[:beam_width])
