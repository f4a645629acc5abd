"""Readable reasoning: the text shows what the engine answers."""

from __future__ import annotations

from pathlib import Path

from benchmarks.accuracy.inspect_reasoning import ANSWERS, BEAM, NEAREST, best_steps, main, reading
from serving.bundle import Bundle
from serving.engine import Engine
from serving.types import Request, Rules
from training.data.shop import write_shop

DEMO = Path(__file__).parents[3] / "bundles/demo"


def test_states_and_answers_are_the_engines_and_the_target_is_bold():
    engine = Engine(Bundle.load(DEMO))
    titles, history = engine.bundle.catalogue.titles, [5, 17, 400]
    request = Request(tuple(history), ANSWERS, BEAM, 2, Rules(exclude=tuple(history)), explain=True)
    answer = engine.search([request], engine.encode([history]))[0]
    text = reading(engine, history, answer.items[1], 2)
    names = [str(titles[item]) for item in answer.items]
    names[1] = f"**{names[1]}**"
    assert f"| 2 | {'; '.join(names)} |" in text
    deepest = engine.bundle.max_steps
    explained = Request(tuple(history), ANSWERS, BEAM, deepest, Rules(exclude=tuple(history)), explain=True)
    trace = engine.search([explained], engine.encode([history]))[0].trace
    assert trace is not None
    for nearest in trace.nearest_items:
        assert "; ".join(str(titles[item]) for item in nearest[:NEAREST]) in text.replace("**", "")
    assert text.count("\n| ") == 1 + deepest + 1 + 1 + 2  # two heads, a row per state, a row per answer


def test_the_best_number_of_steps_is_validations():
    bundle = Bundle.load(DEMO)
    measured = {row["steps"]: row["ndcg@10"] for row in bundle.accuracy if row["steps"]}
    assert measured[best_steps(bundle)] == max(measured.values())


def test_users_follow_the_seed(tmp_path):
    write_shop(tmp_path / "shop", users=40, items=1000, seed=0)
    command = ["--bundle", str(DEMO), "--data", str(tmp_path / "shop"), "--users", "2", "--out"]
    for name, seed in (("a.md", 0), ("b.md", 0), ("c.md", 1)):
        main([*command, str(tmp_path / name), "--seed", str(seed)])
    a, b, c = ((tmp_path / name).read_text().split("<sub>")[0] for name in ("a.md", "b.md", "c.md"))
    assert a == b and a != c and a.count("## User") == 2
    assert a.count("Bought next") == c.count("Bought next") == 2
