"""The search against its slow reference: same items, same order, same scores, alone and in any batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.bundle import Bundle
from serving.engine import Engine
from serving.errors import EngineError, RequestError
from serving.items.blocked import Blocked
from serving.items.neighbours import NO_ITEM
from serving.items.trie import Trie
from serving.reference import Reference
from serving.search import scoring
from serving.search.beam import reason
from serving.search.candidates import favoured
from serving.search.dense import Best, DenseScore
from serving.search.memory import MemoryScores
from serving.types import Answer, Gate, Request, Rules, RuntimeName
from tests.answers import assert_same_answer
from tests.builders import GATE, tiny_model

TOLERANCE = 1e-4
RUNTIMES: list[RuntimeName] = ["eager", "onnx", *(["cuda"] if torch.cuda.is_available() else [])]  # type: ignore[list-item]


def ask(engine: Engine, *requests: Request) -> list[Answer]:
    return engine.search(list(requests), engine.encode([request.history for request in requests]))


def with_paths(bundle: Bundle, request: Request) -> Bundle:
    """The bundle with the reasoning paths that a request asks for."""
    if request.paths is None:
        return bundle
    return replace(bundle, settings=replace(bundle.settings, paths=request.paths))


def assert_as_reference(bundle: Bundle, request: Request, answer: Answer) -> None:
    """Same items, same order, same scores."""
    bundle = with_paths(bundle, request)
    reference = Reference(bundle, request.history, request.reasoning_steps)
    permitted = np.flatnonzero(bundle.catalogue.permitted(request.rules)).tolist()
    dense = bundle.dense_weight if request.dense_weight is None else request.dense_weight
    near = bundle.neighbours_weight if request.neighbours_weight is None else request.neighbours_weight
    expected = reference.search(request.beam_width, permitted, dense or None, near)[: request.k]
    assert_same_answer(answer, expected, TOLERANCE)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Bundle, list[Request]]:
    """A random small model over a random trie, and up to nine requests that share a search."""
    seed = draw(st.integers(0, 10_000))
    items = draw(st.integers(1, 40))
    levels = draw(st.integers(1, 4))
    shared = draw(st.sampled_from([0, 2, 3]))  # levels with one codebook
    sizes = ((40,), (8, 7), (5, 4, 4), (4, 3, 3, 3))[levels - 1]
    if shared and levels > 2:
        sizes = (4, 4, 4) + (3,) * (levels - 3)
    bundle = tiny_model(
        items,
        sizes=sizes,
        shared_levels=shared if levels > 2 else 0,
        seed=seed,
        max_steps=3,
        reasoning_codes=draw(st.sampled_from([0, 3, 8])),
        step_form=draw(st.sampled_from(["token", "state", "both"])),
        attention=draw(st.sampled_from(["bidirectional", "causal-by-item"])),
        age_bias=draw(st.booleans()),
        item_input=draw(st.booleans()),
        suffix_tokens=draw(st.sampled_from([(), (1,)])),
        temperature=draw(st.sampled_from([1.0, 0.8])),
        merge=draw(st.sampled_from(["logsumexp", "max"])),
        normalise=draw(st.sampled_from(["block", "vocabulary"])),
        dense_candidates=draw(st.sampled_from([0, 4])),
        neighbours=True,
        gate=draw(st.sampled_from([None, GATE, Gate(-20.0), Gate(0.3, confidence=1.0), Gate(-9.0, network_power=2.0)])),
    )
    rng = np.random.default_rng(seed)
    batch, steps = draw(st.integers(1, 9)), draw(st.integers(0, 3))
    width = draw(st.sampled_from([1, 3, 10, 50]))
    paths, ruled = draw(st.integers(1, 4)), draw(st.booleans())
    dense = draw(st.sampled_from([(0.0,), (0.7,), (0.0, 0.7)]))  # the same for all, or mixed in one batch
    near = draw(st.sampled_from([(0.0,), (1.0,), (1.5,), (0.0, 1.5, 0.2)]))

    def some(most: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, items, rng.integers(0, most)).tolist())

    def rules() -> Rules:
        return Rules(
            exclude=some(9),
            deny=some(items),
            allow=some(2 * items) if rng.random() < 0.3 else None,
            categories=("even",) if items > 1 and rng.random() < 0.3 else (),
            catalogue="small" if rng.random() < 0.2 else None,
        )

    return bundle, [
        Request(
            some(9),
            width,
            width,
            steps,
            rules() if ruled else Rules(),
            dense[i % len(dense)],
            near[i % len(near)],
            paths=paths,
        )
        for i in range(batch)
    ]


@pytest.mark.parametrize("runtime", RUNTIMES)
@settings(max_examples=40, deadline=None)
@given(world=worlds())
def test_answers_are_those_of_the_reference(runtime, world):
    bundle, requests = world
    engine = Engine(bundle, runtime=runtime)
    for request, answer in zip(requests, ask(engine, *requests), strict=True):
        assert_as_reference(bundle, request, answer)


@pytest.mark.parametrize("runtime", RUNTIMES)
@settings(max_examples=10, deadline=None)
@given(world=worlds())
def test_an_answer_is_the_same_alone_and_in_any_batch(runtime, world):
    bundle, requests = world
    engine = Engine(bundle, runtime=runtime)
    together = ask(engine, *requests)
    for request, answer in zip(requests, together, strict=True):
        (alone,) = ask(engine, request)
        assert_same_answer(alone, answer)


@pytest.mark.parametrize("runtime", RUNTIMES)
@settings(max_examples=20, deadline=None)
@given(world=worlds())
def test_given_items_score_what_a_search_gives_them(runtime, world):
    """Those that a search finds, however narrow it is, and what the reference says of all."""
    bundle, requests = world
    engine, every = Engine(bundle, runtime=runtime), len(bundle.catalogue)
    ranked = ask(engine, *(replace(each, items=tuple(range(i, every)), k=every) for i, each in enumerate(requests)))
    for whole, found in zip(ranked, ask(engine, *requests), strict=True):
        scores = dict(zip(whole.items, whole.scores, strict=True))
        for item, score in zip(found.items, found.scores, strict=True):
            assert item not in scores or scores[item] == pytest.approx(score, abs=TOLERANCE)
    dense, near = requests[0].dense_weight, requests[0].neighbours_weight
    reference = Reference(with_paths(bundle, requests[0]), requests[0].history, requests[0].reasoning_steps)
    assert_same_answer(ranked[0], reference.rank(range(every), dense, near or 0.0), TOLERANCE)


def test_more_items_than_share_a_pass_are_ranked_like_few(monkeypatch: pytest.MonkeyPatch):
    bundle = tiny_model(60, seed=12, paths=3, dense_weight=0.5, neighbours=True, neighbours_weight=1.0, gate=GATE)
    engine, items = Engine(bundle), tuple(range(59, 0, -2))
    together = Request((4, 8), 60, 60, 2, items=items)
    (expected,) = ask(engine, together)
    monkeypatch.setattr(scoring, "AT_ONCE", 7)
    found, alone = ask(engine, together, replace(together, items=items[3:4]))
    assert set(found.items) == set(items) and found.scores == sorted(found.scores, reverse=True)
    assert_same_answer(found, expected)
    assert alone.items == [items[3]]
    assert alone.scores[0] == pytest.approx(dict(zip(found.items, found.scores, strict=True))[items[3]], abs=TOLERANCE)


def test_an_item_that_no_search_can_find_is_not_ranked():
    bundle = tiny_model(20)
    engine = Engine(bundle)
    engine.adopt(engine.with_room())
    bundle.catalogue.listed[3] = False
    engine.refresh([3])
    ranked, nothing = ask(engine, Request((1,), 20, 20, 1, items=(2, 3, 4)), Request((1,), 20, 20, 1, items=()))
    assert sorted(ranked.items) == [2, 4] and nothing.items == []
    beyond = len(engine.trie.leaf)  # an item that came when there was no room for it
    assert ask(engine, Request((1,), 20, 20, 1, items=(beyond,)))[0].items == []


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), steps=st.integers(0, 2), paths=st.integers(1, 3))
def test_k_never_shrinks(seed, k, steps, paths):
    gate = (None, GATE, Gate(-20.0))[seed // 6 % 3]  # the last is the memory alone, which does not know every item
    weight, count = seed % 3, 4 * (seed % 2)
    bundle = tiny_model(
        40, seed=seed, paths=paths, neighbours=True, neighbours_weight=weight, dense_candidates=count, gate=gate
    )
    rng = np.random.default_rng(seed)
    rules = Rules(exclude=tuple(rng.choice(40, int(rng.integers(0, 41)), replace=False).tolist()))
    (answer,) = ask(Engine(bundle), Request((1, 2), k, 12, steps, rules))
    permitted = set(range(40)) - set(rules.exclude)
    assert len(set(answer.items)) == len(answer.items) == min(k, len(permitted))
    assert set(answer.items) <= permitted
    assert answer.scores == sorted(answer.scores, reverse=True)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_wide_beam_scores_every_item_as_brute_force_does(steps):
    bundle = tiny_model(30, seed=1)
    (answer,) = ask(Engine(bundle), Request((1, 2, 3), 30, 30, steps))
    reference = Reference(bundle, (1, 2, 3), steps)
    (path,) = reference.paths()
    every = [(row, reference.score(path, item)) for row, item in enumerate(reference.items)]
    assert_same_answer(answer, sorted(every, key=lambda pair: -pair[1]), TOLERANCE)


def test_equal_scores_are_ordered_by_token_path():
    """With all weights zero every token is equally likely, and so is every item: only the tie-break decides."""
    bundle = tiny_model(40, seed=2)
    for parameter in bundle.network.parameters():
        parameter.data.zero_()
    order = np.lexsort(bundle.catalogue.tokens.T[::-1]).tolist()
    for width in (5, 40):
        for paths in (1, 3):
            request = Request((1, 2), width, width, 2, paths=paths)
            assert ask(Engine(bundle), request, request)[1].items == order[:width]


def test_an_explanation_adds_up():
    bundle = tiny_model(seed=3, step_form="token")
    engine = Engine(bundle)
    (answer,) = ask(engine, Request((1, 2, 3), 5, 64, 1, explain=True))
    (path,) = Reference(bundle, (1, 2, 3), 1).paths()
    assert answer.trace is not None and answer.trace.reasoning_tokens == list(path.tokens)
    np.testing.assert_allclose(answer.trace.reasoning_log_probs, [path.log_prob], atol=TOLERANCE)
    np.testing.assert_allclose(np.sum(answer.trace.token_log_probs, axis=1), answer.scores, atol=TOLERANCE)
    states, vectors = torch.stack(path.states).float(), engine.runtime.item_vectors
    cosine = torch.nn.functional.cosine_similarity(vectors[answer.items].unsqueeze(1), states.unsqueeze(0), dim=-1)
    np.testing.assert_allclose(answer.trace.similarity, cosine.numpy(), atol=TOLERANCE)
    assert answer.trace.nearest_items == (states @ vectors.T).topk(5).indices.tolist()


def test_a_mixture_adds_up_and_rules_change_no_score():
    """With one path the score is the log of the mixed probabilities, and a rule only takes items away."""
    bundle = tiny_model(seed=3, step_form="token", neighbours=True, neighbours_weight=1.0, gate=GATE)
    engine, history = Engine(bundle), (1, 2, 3)
    whole, ruled = ask(
        engine,
        Request(history, 60, 60, 1, explain=True),
        Request(history, 60, 60, 1, Rules(categories=("even",)), explain=True),
    )
    assert whole.trace is not None and whole.trace.gate is not None and 0.05 < whole.trace.gate < 0.95
    for score, tokens, near in zip(
        whole.scores, whole.trace.token_log_probs, whole.trace.neighbour_scores, strict=True
    ):
        share = 0.0 if near is None else np.exp(near)
        g, a, b = whole.trace.gate, GATE.network_power, GATE.memory_power
        expected = g * np.exp(a * sum(tokens)) + (1 - g) * share**b
        assert score == pytest.approx(np.log(expected) / a, abs=TOLERANCE)
    shares = [0.0 if near is None else np.exp(near) for near in whole.trace.neighbour_scores]
    assert sum(shares) == pytest.approx(1, abs=1e-5) and min(shares) == 0
    assert ruled.trace is not None and ruled.trace.gate == pytest.approx(whole.trace.gate)
    kept = [(item, score) for item, score in zip(whole.items, whole.scores, strict=True) if item % 2 == 0]
    assert_same_answer(ruled, kept)


@pytest.mark.parametrize(("weight", "gate"), [(0.0, GATE), (1.0, Gate(40.0))])
def test_the_network_answers_alone_where_the_memory_has_no_say(weight, gate):
    history, with_memory = (1, 2, 3), tiny_model(neighbours=True, neighbours_weight=weight, gate=gate, seed=8)
    (found,) = ask(Engine(with_memory), Request(history, 9, 20, 1))
    (expected,) = ask(Engine(replace(with_memory, neighbours=None)), Request(history, 9, 20, 1, neighbours_weight=0.0))
    assert_same_answer(found, expected)


def test_a_history_without_neighbours_is_the_networks():
    bundle = tiny_model(neighbours=True, neighbours_weight=1.0, gate=GATE, dense_candidates=4, seed=9)
    graph = bundle.neighbours
    assert graph is not None
    unknown = int(np.flatnonzero(np.diff(graph.offsets) == 0)[0])
    (found,) = ask(Engine(bundle), Request((unknown,), 9, 20, 1, explain=True))
    (expected,) = ask(Engine(bundle), Request((unknown,), 9, 20, 1, neighbours_weight=0.0))
    assert found.trace is not None and found.trace.gate == 1.0
    assert_same_answer(found, expected)


def test_the_memory_alone_still_fills_the_list_in_the_networks_order():
    """What no neighbour supports follows by the network's score, behind all that one does."""
    bundle = tiny_model(40, neighbours=True, neighbours_weight=1.0, gate=Gate(-20.0), dense_candidates=40, seed=10)
    (found,) = ask(Engine(bundle), Request((1, 2, 3), 40, 40, 0, explain=True))
    assert found.trace is not None
    known = [near for near in found.trace.neighbour_scores if near is not None]
    assert 0 < len(known) < 40 and found.trace.neighbour_scores[len(known) :] == [None] * (40 - len(known))
    np.testing.assert_allclose(found.scores[: len(known)], known, atol=TOLERANCE)
    (network,) = ask(Engine(bundle), Request((1, 2, 3), 40, 40, 0, neighbours_weight=0.0))
    rest = set(found.items[len(known) :])
    order = [item for item in network.items if item in rest]
    assert found.items[len(known) :] == order


def rows_of_passes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of rows a request has in each of the decoder's passes from now on."""
    rows: list[int] = []
    step = engine.runtime.step

    def counted(x: torch.Tensor, *rest: object) -> object:
        rows.append(x.shape[1])
        return step(x, *rest)

    monkeypatch.setattr(engine.runtime, "step", counted)
    return rows


def test_reasoning_paths_do_not_multiply_the_beam(monkeypatch: pytest.MonkeyPatch):
    bundle = tiny_model(seed=4, paths=5)
    engine = Engine(bundle)
    rows = rows_of_passes(engine, monkeypatch)
    ask(engine, Request((1, 2), 6, 6, 2))
    assert rows == [1, 5, 5, 6, 6]  # start, two steps of five paths, two item tokens of six beams


def test_candidates_of_the_memory_share_the_pass_of_the_last_step(monkeypatch: pytest.MonkeyPatch):
    bundle = tiny_model(40, neighbours=True, neighbours_weight=1.0, gate=GATE, dense_candidates=4, seed=4)
    engine = Engine(bundle)
    rows = rows_of_passes(engine, monkeypatch)
    (found,) = ask(engine, Request((1, 2), 10, 6, 1))
    assert rows == [1, 1 + 4 * 2, 6, 6]
    assert len(set(found.items)) == len(found.items)  # what the beam finds too is listed once
    rows.clear()
    ask(engine, Request((1, 2), 10, 6, 1, paths=2))  # any of which may carry a candidate
    assert rows == [1, 2, 6, 6, 4 * 2]


def test_candidates_are_looked_for_among_as_many_as_the_rules_can_bar(monkeypatch: pytest.MonkeyPatch):
    bundle = tiny_model(40, neighbours=True, neighbours_weight=1.0, gate=Gate(-20.0), dense_candidates=2, seed=10)
    engine, history = Engine(bundle), tuple(range(6))
    best = ask(engine, Request(history, 4, 40, 0))[0].items
    read: list[int] = []
    items_of = Blocked.items

    def counted(self: Blocked, trie: Trie, rows: torch.Tensor | None = None) -> torch.Tensor:
        read.append(0 if rows is None else rows.shape[1])
        return items_of(self, trie, rows)

    monkeypatch.setattr(Blocked, "items", counted)
    (found,) = ask(engine, Request(history, 2, 2, 0, Rules(exclude=(best[0],), deny=(best[0], best[1]))))
    assert found.items == best[2:]  # the best two of all that are left, though the beam is as narrow as can be
    ask(engine, Request(history, 2, 2, 0, Rules(categories=("even",))))  # which bars any number
    assert bundle.neighbours is not None
    touched = bundle.neighbours.shares([history], bundle.max_items)[0].items.shape[1]
    assert read == [2 + 3, touched] and touched > 2 + 3


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_an_answer_does_not_depend_on_whether_the_memory_decides_for_the_whole_batch(runtime, steps):
    """Candidates are decoded along with the reasoning where it does, and in a pass of their own where it does not."""
    bundle = tiny_model(
        40, neighbours=True, neighbours_weight=1.0, gate=GATE, dense_weight=0.5, dense_candidates=4, seed=9
    )
    engine, request = Engine(bundle, runtime=runtime), Request((1, 2), 10, 6, steps, explain=True)
    (alone,) = ask(engine, request)
    together, _ = ask(engine, request, replace(request, neighbours_weight=0.0))
    assert_same_answer(together, alone, TOLERANCE)
    assert alone.trace is not None and together.trace is not None
    np.testing.assert_allclose(together.trace.token_log_probs, alone.trace.token_log_probs, atol=TOLERANCE)
    assert_as_reference(bundle, request, alone)


def test_paths_are_the_likeliest(monkeypatch: pytest.MonkeyPatch):
    bundle = tiny_model(seed=5, step_form="both", paths=3)
    engine = Engine(bundle)
    state = torch.from_numpy(engine.encode([(4, 8)])[0].hidden.astype(np.float32))[None]
    cross = engine.runtime.cross_keys_values(state, torch.ones(state.shape[:2], dtype=torch.bool))
    with torch.inference_mode():
        reasoned = reason(engine.runtime, bundle.search_settings, cross, 2)
    expected: Sequence = Reference(bundle, (4, 8), 2).paths()
    assert [tuple(path) for path in reasoned.tokens[0].tolist()] == [path.tokens for path in expected]
    np.testing.assert_allclose(reasoned.scores[0].numpy(), [path.log_prob for path in expected], atol=TOLERANCE)
    for found, path in zip(reasoned.states[0], expected, strict=True):
        np.testing.assert_allclose(found.numpy(), torch.stack(path.states).numpy(), atol=TOLERANCE)


def bonus_of(*parts: object) -> dict[int, float]:
    """Each item that is favoured, with its bonus; none is named twice."""
    runtime = Engine(tiny_model(4)).runtime
    found = favoured(runtime, *parts)  # type: ignore[arg-type]
    named = [
        (item, bonus)
        for item, bonus in zip(found.items[0].tolist(), found.bonus[0].tolist(), strict=True)
        if bonus > -np.inf
    ]
    assert len(dict(named)) == len(named)
    return {item: round(bonus, 4) for item, bonus in named}


def test_the_bonus_of_a_candidate_is_that_of_the_likeliest_path(monkeypatch: pytest.MonkeyPatch):
    scores = torch.tensor([[1.0, -2.0, 0.5, 9.0], [9.0, 9.0, 9.0, 9.0]])  # two paths disagree, the likelier first

    def of(self: DenseScore, runtime: object, items: torch.Tensor) -> torch.Tensor:
        return scores[0][items]

    monkeypatch.setattr(DenseScore, "of", of)
    dense = DenseScore(scores, scores, Best(torch.tensor([[3, 0]]), scores[:1, [3, 0]]))
    half, inf, never = torch.tensor([0.5]), torch.tensor([float("inf")]), torch.tensor([0.0])
    touched, values = torch.tensor([[0, 2, NO_ITEM]]), torch.tensor([[0.25, 0.75, 0.0]])
    elsewhere = torch.tensor([-3.0])
    added, mixed = (MemoryScores(touched, values, elsewhere, gate) for gate in (None, half))
    nothing = MemoryScores(torch.full_like(touched, NO_ITEM), values, never, inf)
    assert bonus_of(dense, half, None) == {3: 4.5, 0: 0.5}
    assert bonus_of(dense, half, added) == {0: 0.75, 2: 1.0, 3: 1.5}
    assert bonus_of(dense, half, mixed) == bonus_of(None, None, mixed) == {0: 0.25, 2: 0.75}
    assert bonus_of(dense, half, nothing) == {3: 4.5, 0: 0.5}
    assert bonus_of(None, None, nothing) == bonus_of(dense, never, None) == {}
    assert bonus_of(None, None, added) == bonus_of(dense, never, added) == {0: 0.25, 2: 0.75}


def test_nan_scores_are_an_error():
    bundle = tiny_model(seed=6)
    engine = Engine(bundle)
    bundle.network.t5.decoder.final_layer_norm.weight.data.fill_(float("nan"))
    with pytest.raises(EngineError, match="not finite numbers"):
        ask(engine, Request((1, 2), 5, 10, 1))


@pytest.mark.parametrize("row", [-1, 60, 2**40])
def test_a_history_with_an_item_that_does_not_exist_is_an_error(row):
    engine = Engine(tiny_model(60))
    with pytest.raises(RequestError, match=f"row {row}; the catalogue has 0 to 59") as caught:
        engine.encode([(0, 59), (3, row)])
    assert caught.value.field == "history"
    assert len(engine.encode([(row, *range(6))])) == 1  # not among the last six items, which alone are read


def test_an_unavailable_runtime_is_an_error():
    with pytest.raises(ValueError, match="no runtime 'tpu'"):
        Engine(tiny_model(), runtime="tpu")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match="no CUDA device"):
            Engine(tiny_model(), runtime="cuda")


@pytest.mark.parametrize("sizes", [(1,), (3, 1), (40,)])
@pytest.mark.parametrize("steps", [0, 2])
def test_small_catalogues_have_a_defined_answer(sizes, steps):
    """One item, one level, k larger than the catalogue, an empty history, and every item denied."""
    items = min(3, int(np.prod(sizes)))
    bundle = tiny_model(items, sizes=sizes)
    engine = Engine(bundle)
    nothing = Rules(deny=tuple(range(items)))
    open_request, closed = Request((), 50, 50, steps), Request((0,), 50, 50, steps, nothing)
    found, none = ask(engine, open_request, closed)
    assert_as_reference(bundle, open_request, found)
    assert sorted(found.items) == list(range(items))
    assert none.items == [] and none.scores == []
