"""Several views of one network: what they share, how their lists are merged, and the table that compares them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.accuracy import compare_views, view_networks
from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.view_networks import Member, Network, Networks
from benchmarks.accuracy.views import MERGES, Lists, correlation, find_lists, merge, overlap, training_step, views_of
from serving.items.vocabulary import FIRST_START
from tests.training.small import ITEMS, small_config, small_workspace
from training.config_file import ConfigError
from training.data.shop import write_shop
from training.stages.distributed import WHOLE_BATCH
from training.stages.pretrain import PretrainStep
from training.workspace import Workspace

CONFIG = small_config("evaluation.steps=[0]", "pretrain.similar_weight=0", "pretrain.state_weight=1")
SMALL = """
    tokenizer.rqvae.codes=8 tokenizer.kind=random pretrain.similar_weight=0
    model.d_model=16 model.d_kv=8 model.d_ff=16 model.layers=1 model.heads=2 model.max_steps=2
    pretrain.steps=6 pretrain.eval_every=2 pretrain.warmup=0 pretrain.lr=1e-2
    evaluation.valid_users=20 evaluation.choice_users=20
""".split()


@pytest.fixture(scope="module")
def trees() -> list[Workspace]:
    """Two tokenizers of the same items."""
    first, second = small_workspace(CONFIG), small_workspace(CONFIG)
    codes = np.random.default_rng(1).permutation(second.item_tokens_np) - second.vocabulary.level_offsets
    second.item_tokens_np = codes + second.vocabulary.level_offsets
    return [first, second]


def test_the_view_of_one_tree_is_the_plain_network(trees: list[Workspace]):
    tree = small_workspace(CONFIG)
    (view,) = views_of([tree], CONFIG)
    torch.manual_seed(CONFIG.seed)
    assert np.array_equal(view.item_tokens_np, tree.item_tokens_np)
    assert view.vocabulary.level_ranges == tree.vocabulary.level_ranges
    view.network.load_state_dict(tree.network.state_dict())
    losses = [float(step(0)[0].detach()) for step in (PretrainStep(work, CONFIG.pretrain) for work in (view, tree))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_views_share_weights_but_no_token(trees: list[Workspace]):
    views = views_of(trees, CONFIG)
    assert views[0].network is views[1].network
    spans = [view.vocabulary.item_range for view in views]
    assert all(end == begin for (_, end), (begin, _) in pairwise(spans))
    assert [view.vocabulary.start_tokens for view in views] == [[FIRST_START], [FIRST_START + 1]]
    for view, tree in zip(views, trees, strict=True):
        codes = view.item_tokens_np - view.vocabulary.level_offsets
        assert np.array_equal(codes, tree.item_tokens_np - tree.vocabulary.level_offsets)


def test_each_view_is_trained_in_its_turn(trees: list[Workspace]):
    views = views_of(trees, CONFIG)
    step, embedding = training_step(views), views[0].network.t5.shared.weight
    for number in range(4):
        views[0].network.zero_grad()
        step(number, WHOLE_BATCH)[0].backward()
        moved = [float(embedding.grad[slice(*view.vocabulary.item_range)].abs().sum()) > 0 for view in views]
        assert moved == [number % 2 == 0, number % 2 == 1]


def test_more_trees_than_start_tokens_are_refused(trees: list[Workspace]):
    with pytest.raises(ConfigError, match="model.max_steps=3"):
        views_of([*trees, *trees], CONFIG)


def test_lists_leave_out_seen_items_where_they_are_excluded(trees: list[Workspace]):
    view = views_of(trees, CONFIG)[1]
    histories = view.split.test_history
    permitted, excluded = (find_lists(view, histories, ITEMS, rule) for rule in (False, True))
    for history, everything, rest in zip(histories, permitted.items, excluded.items, strict=True):
        assert sorted(everything) == list(range(ITEMS))
        assert set(rest) == {-1} | set(range(ITEMS)) - set(history.tolist())
    assert (np.diff(permitted.log_p, axis=1) <= 0).all()


def test_lists_are_merged_by_probability_or_by_rank():
    def lists(items: list[int], p: list[float]) -> Lists:
        return Lists(np.array([items]), np.log(np.array([p], np.float32)))

    one, other = lists([0, 1, 2], [0.5, 0.3, 0.1]), lists([3, 1, -1], [0.9, 0.05, 0.01])
    by_probability = merge([one, other], MERGES["mean probability"], 5)
    by_rank = merge([one, other], MERGES["reciprocal rank"], 5)
    assert by_probability[0, :4].tolist() == [3, 0, 1, 2]
    assert by_rank[0, 0] == 1 and set(by_rank[0, 1:3]) == {0, 3} and by_rank[0, 3] == 2
    assert (by_rank[0, 4:] == -1).all()  # nobody found more


def test_how_alike_lists_are():
    one, other = np.array([[0, 1, 2, -1]]), np.array([[2, 3, 0, 1]])
    assert overlap([one, one]) == 1 and overlap([one, np.array([[5, 6, 7, -1]])]) == 0
    assert overlap([one, other]) == 1 and overlap([other, one]) == 0.75
    metric = np.array([0.0, 1.0, 0.5])
    assert correlation([metric, metric, metric]) == pytest.approx(1)
    assert correlation([metric, -metric]) == pytest.approx(-1)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a shop whose trees need no model of texts."""
    folder = tmp_path_factory.mktemp("views") / "shop"
    write_shop(folder, users=60, items=40, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view_networks, "SOURCES", ("collaborative",) * 3)
        patch.setattr(compare_views, "LEAST_GAIN", -1)  # every group is trained
        yield folder


@pytest.fixture(scope="module")
def asked(shop: Path):
    """The command on the shop."""
    folder = shop.parent

    def ask() -> dict:
        out = folder / "result.json"
        arguments = ["views", "--data", str(shop), "--work", str(folder / "work"), "--out", str(out)]
        assert main([*arguments, "--set", *SMALL]) == 0
        return json.loads(out.read_text())

    return folder, ask


def test_networks_train_in_the_precision_of_the_run(shop, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(view_networks, "run_stage", lambda *_, precision: used.append(precision))
    arguments = ["views", "--data", str(shop), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "result.json")]
    assert main([*arguments, "--only", "trees-0-seed-0-steps-6", "--set", *SMALL, "precision=bfloat16"]) == 0
    assert used == ["bfloat16"]


def test_every_candidate_has_its_row_by_each_rule_and_a_second_call_trains_nothing(asked):
    folder, ask = asked
    result = ask()
    checks = {row["model"]: row for row in result["checks"]}
    assert list(checks) == ["views", "trees apart", "seeds apart"]
    tested = [name for name, row in checks.items() if row["acts"]]
    rows = {(row["model"], row.get("against"), row["excluded"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"])
    for excluded in (False, True):
        plain = rows["plain", None, excluded]
        assert rows["plain, beam of 150", "plain", excluded]["minutes"] == plain["minutes"]
        for group in tested:
            merged = rows[f"{group}: 3 merged", "plain", excluded]
            assert merged["gain"] == pytest.approx(merged["ndcg@10"] - plain["ndcg@10"], abs=2e-5)
            assert merged["low"] <= merged["gain"] <= merged["high"]
            assert merged["searches"] == 3 and merged["merge"] in MERGES
            chosen = next(
                row
                for row in result["validation"]
                if (row["model"], row["excluded"]) == (f"{group}: 3 merged", excluded)
            )
            assert chosen[merged["merge"]] == max(chosen[form] for form in MERGES)
    trained = sorted((folder / "work" / "views").glob("*/pretrain.latest.safetensors"))
    assert len(trained) == 7  # the first tree's short network is a member of two groups
    before = [path.stat().st_mtime_ns for path in trained]
    assert ask()["rows"] == result["rows"]
    assert [path.stat().st_mtime_ns for path in trained] == before


def test_a_group_that_was_never_better_than_untrained_has_no_rows(asked, monkeypatch, capsys):
    _, ask = asked
    monkeypatch.setattr(Networks, "best_step", lambda self, member: 0 if len(member.network.trees) > 1 else 1)
    result = ask()
    assert [row["acts"] for row in result["checks"]] == [False, True, True]
    assert not any(row["model"].startswith("views") for row in result["rows"])
    assert "views has not been tested" in capsys.readouterr().err


def test_nothing_explains_a_gain_that_is_not_there(asked, monkeypatch, capsys):
    _, ask = asked
    monkeypatch.setattr(compare_views, "LEAST_GAIN", np.inf)
    result = ask()
    assert result["left_out"] == ["trees apart", "seeds apart"]
    assert [row["model"] for row in result["checks"]] == ["views"]
    assert {row["model"].partition(":")[0] for row in result["rows"]} <= {"plain", "plain, beam of 150", "views"}
    assert f"The views gain {result['checks'][0]['percent_on_validation']:.1f}%" in capsys.readouterr().err


def test_the_gain_on_validation_is_that_of_the_better_way_to_merge(monkeypatch):
    together = [Member(Network((0, 1), 0, 6), tree) for tree in (0, 1)]
    groups = {compare_views.PLAIN: [Member(Network((0,), 0, 6), 0)], compare_views.TOGETHER: together}
    asked = []

    def ranks(members: list[Member], form: str, split: str, beam: int, excluded: bool) -> np.ndarray:
        asked.append((split, excluded))
        first = 2 if len(members) == 1 else 1 if form == "mean probability" else 0
        return np.array([first, 10])

    networks = Networks(setup=None)
    monkeypatch.setattr(Networks, "ranks", lambda _, *arguments: ranks(*arguments))
    assert compare_views.gain_on_validation(networks, groups) == pytest.approx(1.0)  # of DCG 1 over DCG 1 / log2(4)
    assert set(asked) == {("valid", False)}
