"""The questions' harness on a tiny shop: ranks and gains by hand, shared ancestors, one question from end to end."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.accuracy import curve
from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.ablation import Ablation, at, best_file
from benchmarks.accuracy.commands import COMMANDS
from benchmarks.accuracy.costs import search_flops, training_flops
from benchmarks.accuracy.item_graph import MEMORY, memory_of, ranks_of
from benchmarks.accuracy.plots import bars
from benchmarks.accuracy.questions import QUESTIONS
from benchmarks.accuracy.ranks import Inference, gain_over, load_ranks, measure_ranks, rank_of_target
from benchmarks.accuracy.recipes import CHOICES, RL_CHOICES
from benchmarks.accuracy.variants import VARIANTS, Setup, inherit, shares, train_variant
from benchmarks.common import ROOT
from tests.training.small import small_config, small_workspace
from training import memory_choice
from training.data.shop import write_shop
from training.join import MEMORY_ALONE, WAYS
from training.linear import LINEAR_GRID
from training.metrics import ndcg
from training.neighbours import JOINED_GRID
from training.pipeline import RunError
from training.stages.sft import SftStep

SMALL = """
    tokenizer.kind=random tokenizer.source=collaborative tokenizer.rqvae.codes=8
    model.d_model=16 model.d_kv=8 model.d_ff=16 model.layers=1 model.heads=2 model.max_steps=12
    pretrain.steps=3 pretrain.similar_weight=0 sft.steps=3 sft.batch_size=16 rl.steps=2 rl.batch_size=8
    evaluation.valid_users=20 evaluation.choice_users=20 evaluation.beam=10 evaluation.dense_weights=[0.0,0.5]
""".split()


def setup(folder: Path) -> Setup:
    return Setup(folder / "shop", folder / "work", None, tuple(SMALL))


def answered(question: str, folder: Path) -> tuple[Ablation, list[dict]]:
    """Trains what a question needs on a tiny shop, and its rows."""
    write_shop(folder / "shop", users=40, items=60, seed=0)
    ablation = Ablation(setup(folder), (0,))
    for variant in QUESTIONS[question].variants:
        ablation.train(variant)
    return ablation, QUESTIONS[question].rows(ablation)


def test_a_targets_rank_is_that_of_its_best_path_and_duplicates_do_not_count():
    items = torch.tensor([[7, 5, 7, 3], [7, 5, 7, 3]])
    scores = torch.tensor([[-4.0, -2.0, -1.0, -3.0], [-4.0, -2.0, -1.0, -3.0]])
    # best first: 7, 5, 3, and 7 again
    assert rank_of_target(items, scores, torch.tensor([3, 9]), 10).tolist() == [2, 10]
    assert rank_of_target(items, scores, torch.tensor([7, 3]), 2).tolist() == [0, 2]


def test_the_gain_and_its_interval_by_hand():
    # each user gains 0.1, so drawing the users again changes nothing
    assert gain_over(np.array([0.3, 0.3]), np.array([0.2, 0.2])) == {
        "gain": 0.1,
        "low": 0.1,
        "high": 0.1,
        "percent": 50.0,
    }
    # two users who gain 0 and 1: a quarter of all draws have the mean 0, a quarter 1
    assert gain_over(np.array([0.0, 1.0]), np.array([0.0, 0.0])) == {"gain": 0.5, "low": 0.0, "high": 1.0}


def test_variants_share_the_stages_in_which_they_do_not_differ(tmp_path):
    here = setup(tmp_path)
    plain, two, four = (here.settings(variant, 0) for variant in ("plain", "l = 2", "l = 4"))
    assert shares(plain, two, "pretrain") and not shares(plain, here.settings("plain", 1), "pretrain")
    assert not shares(two, four, "sft") and shares(four, here.settings("rl, no match", 0), "sft")
    assert not shares(plain, here.settings("similar items", 0), "pretrain")
    assert not shares(plain, here.settings("plain", 0, ("tokenizer.kind=rqvae",)), "pretrain")


def test_runs_from_before_a_setting_existed_are_inherited_with_its_default(tmp_path):
    here = setup(tmp_path)
    old, config = here.folder("l = 4", 0), here.settings("l = 4", 0).to_json()
    del config["sft"]["distillation_weight"], config["sft"]["labels"], config["rl"]["group"]
    (old / "tokenizer").mkdir(parents=True)
    (old / "run.json").write_text(json.dumps({"config": config}))
    retired = here.work / "seed-0/target-content/run.json"  # of a version that knew another setting
    retired.parent.mkdir()
    retired.write_text(json.dumps({"config": config | {"sft": {"target": "content"}}}))
    save_file({"codes": torch.zeros(1)}, old / "semantic_ids.safetensors")
    for stage in ("pretrain", "sft"):
        for kind in ("best", "latest"):
            save_file({}, old / f"{stage}.{kind}.safetensors", {"meta": json.dumps({"step": 3})})
    expected = {"rl, group of 16": {"pretrain", "sft"}, "distilled": {"pretrain"}, "shared codes": set[str]()}
    for variant, stages in expected.items():
        folder = here.folder(variant, 0)
        folder.mkdir()
        inherit(folder, here.settings(variant, 0), VARIANTS[variant].until)
        assert {file.name.split(".")[0] for file in folder.glob("*.latest.safetensors")} == stages, variant


def test_former_names_of_questions_are_understood(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["small", "--data", str(tmp_path), "--device", "cuda"])
    assert "compression measures 8-bit weights" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["magic", "--data", str(tmp_path)])
    assert "open_choices" in capsys.readouterr().err


def test_help_and_the_readme_list_every_question(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out.split("\nquestions:\n")[1]
    assert re.findall(r"^  (\w+)", listed, re.MULTILINE) == list(COMMANDS)
    readme = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- questions -->\n(.*?)<!-- /questions -->", readme, re.DOTALL)[1]
    rows = re.findall(r"^\| `(\w+)` +\| (.+?) +\|$", table, re.MULTILINE)
    assert rows == [(name, command.about) for name, command in COMMANDS.items()]


def test_every_question_names_variants_that_exist(tmp_path):
    for question in QUESTIONS.values():
        for variant in question.variants:
            assert variant in VARIANTS
            setup(tmp_path).settings(variant, 0)  # and whose settings are valid


@pytest.mark.parametrize("config", ["small", "converged"])
def test_no_open_choice_is_the_default_one_by_another_name(tmp_path, config):
    here = Setup(tmp_path, tmp_path, ROOT / f"benchmarks/{config}.yaml", ())
    for whole, others in (("l = 4", CHOICES), ("rl", RL_CHOICES)):
        assert not any(shares(here.settings(whole, 0), here.settings(other, 0), "rl") for other in others)


def test_rows_of_one_checkpoint_say_so_and_nothing_gains_over_itself(tmp_path, monkeypatch):
    """Stage 3 kept the weights it began with: its row is stage 2's by another name."""
    ablation = Ablation(setup(tmp_path), (0, 1))
    for variant, weights in (("l = 4", 1.0), ("rl", 1.0), ("rl, anchor alone", 2.0)):
        for seed in ablation.seeds:
            folder = ablation.setup.folder(variant, seed)
            folder.mkdir(parents=True)
            save_file({"weights/x": torch.full((2,), weights + seed)}, folder / best_file(variant))
            for stage in ("pretrain", "sft", "rl"):
                save_file({}, folder / f"{stage}.latest.safetensors", {"meta": json.dumps({"seconds": 60.0})})
    ranks = np.array([[1, 5, 2], [3, 1, 20]])
    monkeypatch.setattr(Ablation, "ranks", lambda self, cell: ranks + cell.inference.steps)
    whole = at("l = 4", 4)
    rows = ablation.rows([whole, at("rl", 4, against=whole.model), at("rl", 0, against=whole.model),
                          at("rl, anchor alone", 4, against=whole.model)])  # fmt: skip
    assert [row.get("same_checkpoint_as") for row in rows] == [None, whole.model, whole.model, None]
    assert ["gain" in row for row in rows] == [False, False, True, True]
    assert [row.get("against") for row in rows] == [None, *[whole.model] * 3]
    bars(rows, tmp_path / "bars.svg", "over stage 2")  # draws what there is


def test_times_are_read_where_answers_are_measured(tmp_path):
    ablation, rows = answered("times", tmp_path)
    assert [row["model"] for row in rows] == [
        "packed", "packed, with times", "packed, state alone", "packed, with times, state alone"
    ]  # fmt: skip
    assert [row.get("against") for row in rows] == [None, "packed", None, "packed, state alone"]
    work = ablation.work("packed, with times", 0)
    torch.nn.init.normal_(work.network.heads.time_bias.weight)  # three steps teach it nothing
    told = measure_ranks(work, Inference("test", 0)).dense
    untold = measure_ranks(replace(work, split=replace(work.split, test_events=None)), Inference("test", 0)).dense
    assert (told != untold).any()


def test_a_question_from_end_to_end(tmp_path):
    write_shop(tmp_path / "shop", users=40, items=60, seed=0)
    command = ["joined", "--data", str(tmp_path / "shop"), "--work", str(tmp_path / "work")]
    command += ["--out", str(tmp_path / "joined.json"), "--set", *SMALL]
    assert main(command) == 0
    result = json.loads((tmp_path / "joined.json").read_text())
    assert {"command", "commit", "machine", "seeds", "protocol", "validation", "trained_by"} <= result.keys()
    QUESTIONS["joined"].draw(result["rows"], tmp_path / "joined.svg")
    assert (tmp_path / "joined.svg").stat().st_size > 1000
    rows = {row["model"]: row for row in result["rows"]}
    joined = rows["l = 4, 4 steps: joined on what the beam found"]
    beam = rows["l = 4, 4 steps: beam"]
    assert joined["against"] == beam["model"] and joined["low"] <= joined["gain"] <= joined["high"]
    assert joined["gain"] == pytest.approx(joined["ndcg@10"] - beam["ndcg@10"], abs=2e-5)
    assert {row["split"] for row in result["rows"]} == {"test"}
    assert {row["split"] for row in result["validation"]} == {"valid"}
    thinking, plain = result["checks"]
    assert (thinking["model"], plain["model"]) == ("l = 4", "state loss alone") and thinking["stage"] == "sft"
    assert 0 < thinking["best_step"] <= thinking["trained"] and plain.keys() <= thinking.keys()
    assert -1 <= thinking["codes_cosine"] <= 1 and min(thinking["entropy_first"], thinking["entropy_last"]) >= 0

    variants = [tmp_path / "work/seed-0" / variant for variant in ("l-4", "state-loss-alone")]
    first, second = ((variant / "pretrain.best.safetensors").stat() for variant in variants)
    assert first.st_ino == second.st_ino  # one stage 1 for both
    ranks = load_ranks(variants[0], Inference("test", 4))
    assert ranks is not None and round(float(ndcg(ranks.rank(0.0)).mean()), 5) == beam["ndcg@10"]

    before = (variants[0] / "sft.latest.safetensors").stat().st_mtime_ns
    assert main(command) == 0
    assert json.loads((tmp_path / "joined.json").read_text())["rows"] == result["rows"]
    assert (variants[0] / "sft.latest.safetensors").stat().st_mtime_ns == before


@pytest.fixture
def few_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a memory, and no texts: the choice among many takes seconds, and so does a text model."""
    monkeypatch.setattr(memory_choice, "similarity_embedding", lambda items, *_: np.zeros((len(items), 2), np.float32))
    for grid in (JOINED_GRID, LINEAR_GRID):
        for name, values in grid.items():
            monkeypatch.setitem(grid, name, values[1:2])


def test_network_and_memory_are_mixed_and_compared_with_neighbours(tmp_path, few_settings):
    ablation, rows = answered("deployed", tmp_path)
    networks = ["plain", "l = 4", "l = 4, 4 steps"]
    single = ["tuned neighbours", "counted with texts", "linear model", "memory alone", *networks]
    mixed = [f"{network}, and memory" for network in networks]
    named = {row["model"]: row for row in rows[:10]}
    assert list(named) == [*single, *mixed] and all(named[name]["way"] in WAYS for name in mixed)
    gains = [(row["model"], row["against"]) for row in rows if "gain" in row]
    assert len(gains) == 9 + 7 and gains[-1] == (mixed[2], mixed[1])
    assert set(zip(mixed, networks, strict=True)) | {(name, "memory alone") for name in mixed} <= set(gains)
    for row in rows:
        if "gain" in row:
            other = named[row["against"]]
            assert row["gain"] == pytest.approx(row["ndcg@10"] - other["ndcg@10"], abs=2e-5)
    judged = [row for row in ablation.validation if "way" in row]
    assert [row["model"] for row in judged] == networks
    assert all(set(row["valid_ndcg@10_cross_fitted"]) == set(WAYS) for row in judged)


def test_a_gate_for_the_memory_alone_ranks_as_the_memory_does(tmp_path, few_settings):
    write_shop(tmp_path / "shop", users=40, items=60, seed=0)
    ablation = Ablation(setup(tmp_path), (0,))
    ablation.train("plain")
    work = ablation.work("plain", 0)
    settings = replace(work.settings, neighbours_weight=1.0, gate=MEMORY_ALONE, dense_candidates=50)
    work = replace(work, neighbours=memory_of(ablation.setup).whole, settings=settings)
    found = measure_ranks(work, Inference("test", 0, mixed=True)).rank(0.0)
    alone = ranks_of(ablation.setup, MEMORY)
    assert (np.minimum(found, 10) == alone).mean() > 0.9  # but for ties


def test_whether_reasoning_pays_is_answered_with_every_control(tmp_path, few_settings):
    ablation, rows = answered("pays", tmp_path)
    against = {(row["model"], row.get("against")) for row in rows}
    assert {("l = 4, 4 steps", "plain, as costly"), ("pause, 4 steps", "plain, as costly"),
            ("rl, 4 steps", "rl, anchor alone, 4 steps"), ("l = 4, 4 steps", "l = 4"),
            ("l = 4, 4 steps, and memory", "tuned neighbours")} <= against  # fmt: skip
    costly = next(row for row in rows if row["model"] == "plain, as costly")
    for row in rows:
        if row.get("against") == costly["model"]:
            assert row["gain"] == pytest.approx(row["ndcg@10"] - costly["ndcg@10"], abs=2e-5)


def test_every_number_of_steps_is_measured_and_steps_are_given_to_those_a_rule_names(tmp_path, monkeypatch):
    monkeypatch.setattr(curve, "LENGTHS", (0, 1, 4))
    monkeypatch.setattr(curve, "SHARES", (0.0, 0.5, 1.0))
    write_shop(tmp_path / "shop", users=40, items=60, seed=0)
    here = setup(tmp_path)
    ablation = Ablation(replace(here, overrides=(*here.overrides, "model.max_steps=4")), (0,))
    for variant in QUESTIONS["curve"].variants:
        ablation.train(variant)
    rows = QUESTIONS["curve"].rows(ablation)
    QUESTIONS["curve"].draw(rows, tmp_path / "curve.svg")

    means = {(row["model"], row["split"]): row["ndcg@10"] for row in rows if "part" not in row}
    for split in ("valid", "test"):
        for variant, asked in (("l = 4", [1, 4]), ("rl", [4])):
            of_split = [row for row in rows if row["split"] == split and row.get("weights") != "int8"]
            assert [row["steps"] for row in of_split if row.get("against") == variant] == asked
    for row in rows:
        if "part" not in row:
            assert row["cpu_ratio"] > 0 and row["answer_mflops"] > 0
            if "gain" in row:
                other = means[row["against"], row["split"]]
                assert row["gain"] == pytest.approx(row["ndcg@10"] - other, abs=2e-5)
    flops = [search_flops(ablation.work("l = 4", 0), Inference("test", steps)) for steps in (0, 1, 4)]
    assert flops == sorted(set(flops))

    selective = [row for row in rows if row.get("part") == "selective"]
    for row in selective:
        if row["share"] in (0, 1):  # nobody, or everybody
            assert row["mean_steps"] == 4 * row["share"]
            assert row["ndcg@10"] == means[f"{row['arm']}, 4 steps" if row["share"] else row["arm"], "test"]
    unsure = [row for row in selective if (row["rule"], row["arm"]) == ("unsure", "rl")]
    assert {row["valid"] for row in unsure if row["chosen"]} == {max(row["valid"] for row in unsure)}


def test_no_question_asks_for_more_steps_than_the_network_takes(tmp_path):
    write_shop(tmp_path / "shop", users=40, items=60, seed=0)
    here = setup(tmp_path)
    ablation = Ablation(replace(here, overrides=(*here.overrides, "model.max_steps=4")), (0,))
    needed = [variant for variant in QUESTIONS["steps"].variants if ablation.permits(variant)]
    assert needed == ["plain", "every l", "l = 4", "l = 2"]
    ablation.train("every l")
    rows = QUESTIONS["adaptive"].rows(ablation)
    assert [row["mean_steps"] for row in rows if row["model"].startswith("always")] == [0, 2, 4]


def test_how_unsure_the_beam_begins_is_the_entropy_of_its_first_level(tmp_path):
    work = small_workspace(small_config())
    found = curve.first_level_entropy(work, "test")
    ranker = work.ranker()
    for user in (0, len(found) - 1):
        beams = ranker.search(ranker.encode([work.split.test_history[user]]), 0, 30)  # every item
        first = dict(zip(work.item_tokens[beams.items[0], 0].tolist(), beams.token_log_probs[0, :, 0], strict=True))
        log_p = torch.stack(list(first.values()))
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
        assert found[user] == pytest.approx(-(log_p.exp() * log_p).sum().item(), abs=1e-5)


def test_open_choices_are_compared_with_the_default_and_shared_codes_with_their_own_plain_model(tmp_path):
    ablation, rows = answered("open_choices", tmp_path)
    against = {(row["model"], row["against"]) for row in rows if "against" in row}
    for choice in CHOICES:
        assert {(choice, "l = 4"), (f"{choice}, 4 steps", "l = 4, 4 steps")} <= against
    for choice in RL_CHOICES:
        assert {(choice, "rl"), (f"{choice}, 4 steps", "rl, 4 steps")} <= against
    assert {("plain, shared codes", "plain"), ("shared codes, 4 steps", "plain, shared codes")} <= against
    means = {row["model"]: row["ndcg@10"] for row in rows}
    for row in rows:
        if "gain" in row:
            assert row["gain"] == pytest.approx(row["ndcg@10"] - means[row["against"]], abs=2e-5)
    assert (
        ablation.work("shared codes", 0).vocabulary.reasoning_range
        == ablation.work("shared codes", 0).vocabulary.item_range
    )


def test_a_variant_trained_with_other_settings_is_not_reused(tmp_path):
    write_shop(tmp_path / "shop", users=40, items=60, seed=0)
    train_variant(setup(tmp_path), "plain", 0)
    before = (tmp_path / "work/seed-0/plain/pretrain.latest.safetensors").stat().st_mtime_ns
    train_variant(setup(tmp_path), "plain", 0)
    assert (tmp_path / "work/seed-0/plain/pretrain.latest.safetensors").stat().st_mtime_ns == before
    other = Setup(tmp_path / "shop", tmp_path / "work", None, (*SMALL, "pretrain.lr=0.5"))
    with pytest.raises(RunError, match="other data or settings"):
        train_variant(other, "plain", 0)


def test_flops_of_training_are_those_of_a_step_that_is_computed():
    config = small_config("sft.batch_size=16", "lengths=[2]")
    work = small_workspace(config)
    step, steps = SftStep(work, config.sft), 2
    with FlopCounterMode(display=False) as counter:
        for number in range(steps):
            step(number)[0].backward()
    assert training_flops(work, "sft", config, steps) == counter.get_total_flops() / steps > 0
    assert work.device.type == "cpu" and all(p.device.type == "cpu" for p in work.network.parameters())
