"""The whole path from the command line: from data to a bundle that serves, and one sentence for every error."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import T5ForConditionalGeneration

from serving.bundle import Bundle
from serving.engine import Engine
from serving.errors import StorageError
from serving.files import locked_folder
from serving.online.admission import Plan
from serving.online.query import Query
from serving.online.recommender import recommend_batch
from serving.sample import check_sample
from serving.types import Event, Request
from tests.tools import always_full
from tests.training.shops import QUICK, command, write_shop
from tests.waiting import DEADLINE
from training.__main__ import main
from training.config_file import load_config
from training.data.prepare import split_by
from training.data.read import read_data
from training.pipeline import read_given_ids, tokenize
from training.stages.loop import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with `shop` and the `bundle` that the whole command makes of it."""
    folder = tmp_path_factory.mktemp("made")
    write_shop(folder / "shop")
    assert main(command("run", folder / "shop", folder / "bundle", "name=tiny shop", "licence=CC0")) == 0
    return folder


def fails(capsys, *arguments: str) -> str:
    """Runs a command that must end with one sentence on stderr and exit code 2."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("streamrec: ")]
    assert len(lines) == 1
    return lines[0]


def test_the_bundle_answers_and_transformers_opens_it(made):
    bundle = Bundle.load(made / "bundle")
    assert bundle.name == "tiny shop" and len(bundle.catalogue) == 30
    assert bundle.sample and check_sample(Engine(bundle)) == 1.0
    for steps in range(3):
        request = Request((0, 1, 2), 5, 10, steps)
        engine = Engine(bundle)
        (answer,) = engine.search([request], engine.encode([request.history]))
        assert len(set(answer.items)) == 5
    T5ForConditionalGeneration.from_pretrained(made / "bundle/model")
    card = (made / "bundle/README.md").read_text()
    assert "tiny shop" in card and "CC0" in card and "bidirectional" not in card.split("## Method")[0]


def test_the_bundle_records_what_was_measured_and_how_settings_were_chosen(made):
    manifest = json.loads((made / "bundle/bundle.json").read_text())
    assert [row["steps"] for row in manifest["accuracy"]] == [0, 1, 2]
    assert all((row["split"], row["of"]) == ("valid", 60) for row in manifest["accuracy"])
    without, *others = manifest["accuracy"]
    for row in others:
        assert row["gain"] == pytest.approx(row["ndcg@10"] - without["ndcg@10"], abs=2e-5)
        assert row["gain_low"] <= row["gain"] <= row["gain_high"] and row["detectable"] >= 0
    card = (made / "bundle/README.md").read_text()
    last = others[-1]
    gain = f"{last['gain']:+.4f} ({last['gain_low']:+.4f} to {last['gain_high']:+.4f})"
    assert f"| 2 | {last['recall@10']:.4f} | {last['ndcg@10']:.4f} | {gain} | {last['detectable']:.4f} | " in card
    assert f"| 0 | {without['recall@10']:.4f} | {without['ndcg@10']:.4f} |  |  | " in card
    choices = manifest["about"]["choices"]
    assert {(row["steps"], row["dense_weight"]) for row in choices} == {(s, w) for s in range(3) for w in (0.0, 1.0)}
    accuracy = {(row["steps"], row["dense_weight"]): row["ndcg@10"] for row in choices}
    steps, weight = manifest["reasoning"]["default_steps"], manifest["score"]["dense_weight"]
    assert accuracy[steps, weight] == max(accuracy[steps, other] for other in (0.0, 1.0))
    assert accuracy[steps, weight] >= max(accuracy[0, other] for other in (0.0, 1.0))
    assert set(manifest["about"]["stages"]) == {"pretrain", "sft", "rl"}
    assert manifest["about"]["config"]["rl"]["steps"] == 20


def test_the_log_holds_losses_and_diagnostics_of_every_stage(made):
    lines = [json.loads(line) for line in (made / "bundle.work/log.jsonl").read_text().splitlines()]
    for stage in ("pretrain", "sft", "rl"):
        measured = [line for line in lines if line["stage"] == stage and "score" in line]
        assert [line["step"] for line in measured] == [0, 10, 20]
        (last,) = [line for line in lines if line["stage"] == stage and "loss" in line]
        assert last["step"] == 20 and last["grad_norm"] > 0
        wanted = {"ndcg@10/l0", "ndcg@10/l2", "entropy/1", "entropy/2", "cosine/0", "cosine/2", "unparsable", "score"}
        assert wanted <= set(measured[0])
    assert list((made / "bundle.work/tensorboard").iterdir())
    text = "".join(json.dumps(line) for line in lines)
    assert '"u0"' not in text and '"i0"' not in text


def test_a_model_that_reads_times_and_items_goes_through_all_stages(tmp_path, capsys):
    data = write_shop(tmp_path / "shop", first=1_700_000_000, pause=3600)
    assert main(command("run", data, tmp_path / "bundle", "model.time_bias=true", "model.item_input=true")) == 0
    bundle = Bundle.load(tmp_path / "bundle")
    assert bundle.settings.time_bias and bundle.network.heads.time_bias.weight.any()
    assert bundle.settings.item_input and bundle.network.heads.item_input.weight.any()
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "`time_bias.weight` (heads.safetensors)" in card and "`item_input.weight` (heads.safetensors)" in card
    assert "Full ranking for 20 of 60 users" in card
    assert "Validation while training is on 20 of 60 users" in capsys.readouterr().out
    assert main(["evaluate", "--bundle", str(tmp_path / "bundle"), "--data", str(data), "--steps", "0"]) == 0
    measured = json.loads(capsys.readouterr().out)
    history = [Event(f"i{row}", timestamp=1.7e9 + 3600 * row) for row in range(3)]
    (told, untold) = recommend_batch(
        Engine(bundle), [Query(h, k=5) for h in (history, ["i0", "i1", "i2"])], Plan(0, 20)
    )
    assert measured["users"] == 60 and told.scores != untold.scores


def test_popularity_counts_training_events_only(made):
    bundle = Bundle.load(made / "bundle")
    counts = dict.fromkeys(bundle.catalogue.item_ids, 0)
    by_user: dict[str, list[str]] = {}
    for line in (made / "shop/interactions.csv").read_text().splitlines()[1:]:
        user, item, _ = line.split(",")
        by_user.setdefault(user, []).append(item)
    for items in by_user.values():
        for item in items[:-2]:
            counts[item] += 1
    np.testing.assert_array_equal(bundle.catalogue.popularity, [counts[name] for name in bundle.catalogue.item_ids])


def test_a_finished_stage_is_not_run_again(made, capsys, monkeypatch):
    monkeypatch.delattr("training.stages.pretrain.similar_items")
    weights = made / "bundle.work/rl.latest.safetensors"
    before = weights.stat().st_mtime_ns
    assert main(command("rl", made / "shop", made / "bundle", "name=tiny shop", "licence=CC0")) == 0
    assert weights.stat().st_mtime_ns == before


def test_running_the_stages_one_by_one_gives_the_same_bundle(made, tmp_path):
    for stage in ("prepare", "tokenize", "pretrain", "sft", "rl", "export"):
        assert main(command(stage, made / "shop", tmp_path / "bundle")) == 0
        assert (tmp_path / "bundle").exists() == (stage == "export")
    for name in ("model/model.safetensors", "heads.safetensors", "catalogue.parquet"):
        assert (tmp_path / "bundle" / name).read_bytes() == (made / "bundle" / name).read_bytes()


def with_given_ids(folder: Path, codes: dict, *names: str) -> Path:
    """A shop with files of semantic IDs."""
    data = write_shop(folder)
    (data / "semantic_ids").mkdir()
    give_ids(data, codes, *names)
    return data


def give_ids(data: Path, codes: dict, *names: str) -> None:
    for name in names:
        (data / f"semantic_ids/{name}.json.gz").write_bytes(gzip.compress(json.dumps(codes).encode()))


def test_given_semantic_ids_are_used(tmp_path, capsys):
    codes = {f"i{i}": [f"<a_{i % 5}>", f"<b_{i // 5}>"] for i in range(30)} | {"not ours": ["<a_0>", "<b_0>"]}
    data = with_given_ids(tmp_path / "shop", codes, "mine")
    settings = ("tokenizer.kind=given", "pretrain.steps=1", "sft.steps=0", "rl.steps=0")
    assert main(command("run", data, tmp_path / "b", *settings)) == 0
    printed = capsys.readouterr().out
    assert "note: 1 given semantic IDs of items that are not in the catalogue (left out)" in printed
    assert "does not use" not in printed
    bundle = Bundle.load(tmp_path / "b")
    assert bundle.vocabulary.codebook_sizes == (5, 6)
    row = bundle.catalogue.row("i13")
    assert (bundle.catalogue.tokens[row] - bundle.vocabulary.level_offsets).tolist() == [3, 2]


def test_a_run_that_names_its_given_ids_is_the_one_that_found_them(tmp_path, capsys):
    data = with_given_ids(tmp_path / "shop", {f"i{i}": [i % 5, i // 5] for i in range(30)}, "mine")
    kind = "tokenizer.kind=given"
    assert main(command("prepare", data, tmp_path / "b", kind)) == 0
    shutil.copy(data / "semantic_ids/mine.json.gz", data / "semantic_ids/theirs.json.gz")
    assert "given_ids, one of mine, theirs" in fails(capsys, *command("tokenize", data, tmp_path / "b", kind))
    assert main(command("tokenize", data, tmp_path / "b", kind, "given_ids=mine")) == 0


def test_given_semantic_ids_that_cannot_be_used_leave_no_trace(tmp_path, capsys):
    data = with_given_ids(tmp_path / "shop", {f"i{i}": [i, -1] for i in range(30)})
    given = command("prepare", data, tmp_path / "b", "tokenizer.kind=given")
    assert "has no semantic_ids/*.json.gz" in fails(capsys, *given)
    shutil.rmtree(data)
    with_given_ids(data, {f"i{i}": [i, -1] for i in range(30)}, "mine")
    assert "has the code -1; write codes as whole numbers from 0" in fails(capsys, *given)
    assert not (tmp_path / "b.work/run.json").exists()


@pytest.mark.parametrize(
    ("names", "how"),
    [(("mine",), "--set tokenizer.kind=given\n"), (("a", "b"), "--set tokenizer.kind=given given_ids=a\n")],
)
def test_a_run_that_makes_semantic_ids_says_that_it_does_not_use_given_ones(tmp_path, capsys, names, how):
    data = with_given_ids(tmp_path / "shop", {}, *names)
    assert main(command("prepare", data, tmp_path / "b")) == 0
    listed = ", ".join(f"semantic_ids/{name}.json.gz" for name in names)
    assert f"Makes semantic IDs and does not use {listed}; to use them instead: {how}" in capsys.readouterr().out


def test_given_semantic_ids_of_one_codebook_share_a_block(tmp_path):
    codes = {f"i{i}": [f"<T_{i % 5}>", f"<T_{i // 5}>", f"<T_{i % 3}>"] for i in range(30)} | {"i29": ["<T_1>"] * 3}
    data = with_given_ids(tmp_path / "shop", codes, "mine")
    settings = ("tokenizer.kind=given", "given_ids=mine")
    assert main(command("tokenize", data, tmp_path / "b", *settings)) == 0
    config = load_config(None, [*QUICK, *settings])
    read = read_data(data)
    given = read_given_ids(data, config, read.items)
    work = tokenize(read, split_by(read, "leave-one-out"), given, tmp_path / "b.work", config)
    assert work.vocabulary.shared_levels == 3 and work.vocabulary.codebook_sizes == (6, 6, 6)
    row = read.items.item_ids.index("i13")
    assert (work.item_tokens_np[row] - work.vocabulary.item_offset).tolist() == [3, 2, 1]


def test_semantic_ids_that_changed_since_the_run_began_are_refused(tmp_path, capsys):
    data = with_given_ids(tmp_path / "shop", {"i0": ["<a_1>"]}, "mine")
    tokenize_again = command("tokenize", data, tmp_path / "b", "tokenizer.kind=given")
    assert "has no codes" in fails(capsys, *tokenize_again) and not (tmp_path / "b.work/run.json").exists()
    codes = {f"i{i}": [f"<a_{i % 5}>", f"<b_{i // 5}>"] for i in range(30)}
    give_ids(data, codes, "mine")
    assert main(tokenize_again) == main(tokenize_again) == 0
    give_ids(data, codes | {"i0": ["<a_4>", "<b_9>"]}, "mine")
    assert "other data or settings; choose another --out or remove" in fails(capsys, *tokenize_again)
    own = command("prepare", data, tmp_path / "own")  # which makes its own: those do not concern it
    assert main(own) == 0
    assert [*json.loads((tmp_path / "own.work/run.json").read_text())["data"]] == ["interactions.csv"]


def test_other_settings_or_other_data_are_refused_in_a_used_folder(made, capsys):
    message = fails(capsys, *command("run", made / "shop", made / "bundle", "sft.lr=0.5"))
    assert "other data or settings" in message and "--out" in message
    changed = write_shop(made / "another") / "interactions.csv"
    changed.write_text(changed.read_text() + "u1,i2,99\n")
    message = fails(capsys, *command("run", made / "another", made / "bundle", "name=tiny shop", "licence=CC0"))
    assert "other data or settings" in message


def test_a_folder_of_an_earlier_version_goes_on_or_says_to_start_afresh(made, tmp_path, capsys):
    assert main(command("prepare", made / "shop", tmp_path / "b")) == 0
    file = tmp_path / "b.work/run.json"
    run = json.loads(file.read_text())
    run["config"]["sft"]["target"] = "item"
    file.write_text(json.dumps(run))
    assert main(command("prepare", made / "shop", tmp_path / "b")) == 0
    run["config"]["sft"]["target"] = "content"
    file.write_text(json.dumps(run))
    message = fails(capsys, *command("prepare", made / "shop", tmp_path / "b"))
    assert "sft.target=content is no longer supported" in message and "--out" in message


def test_two_trainings_do_not_share_a_folder(made, tmp_path, capsys):
    work = tmp_path / "b.work"
    work.mkdir()
    with locked_folder(work):
        message = fails(capsys, *command("run", made / "shop", tmp_path / "b"))
    assert "Another run is using" in message
    assert [path.name for path in work.iterdir()] == ["lock"]  # nothing was touched


def test_a_missing_column_an_unknown_item_and_a_bad_time_are_named_with_file_and_row(tmp_path, capsys):
    data = write_shop(tmp_path / "shop")
    table = data / "interactions.csv"
    whole = table.read_text()
    table.write_text(whole.replace("item_id", "article", 1))
    assert "interactions.csv has no column item_id" in fails(capsys, *command("run", data, tmp_path / "b"))
    table.write_text(whole + "u1,i2,yesterday\n")
    row = len(whole.splitlines())
    assert f"interactions.csv, row {row}: 'yesterday'" in fails(capsys, *command("run", data, tmp_path / "b"))
    table.write_text(whole)
    (data / "items.jsonl").write_text("".join(json.dumps({"item_id": f"i{i}"}) + "\n" for i in range(29)))
    first = next(at for at, line in enumerate(whole.splitlines()) if ",i29," in line)
    message = fails(capsys, *command("run", data, tmp_path / "b"))
    assert f"interactions.csv, row {first}: item 'i29'" in message and "items.jsonl" in message


def test_the_process_exits_with_2_and_one_line(tmp_path):
    data = write_shop(tmp_path / "shop")
    (data / "interactions.csv").write_text("user_id,timestamp\nu1,1\n")
    done = subprocess.run([sys.executable, "-m", "training", *command("run", data, tmp_path / "b")],
                          cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "item_id" in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_setting_is_named(made, tmp_path, capsys):
    assert "sft.stepz" in fails(capsys, *command("run", made / "shop", tmp_path / "b", "sft.stepz=1"))
    assert not (tmp_path / "b.work").exists()


def test_a_learning_rate_that_diverges_says_so(made, tmp_path, capsys):
    message = fails(capsys, *command("run", made / "shop", tmp_path / "b", "pretrain.lr=1e30", "pretrain.warmup=0"))
    assert "pretrain diverged" in message and "a lower pretrain.lr" in message
    for kept in ("best", "latest"):
        weights = load_file(tmp_path / f"b.work/pretrain.{kept}.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values())
    work, lower = tmp_path / "b.work", command("pretrain", made / "shop", tmp_path / "b")
    refusal = fails(capsys, *lower)
    advice = f"choose another --out or remove {work}."
    assert refusal.endswith(f"belongs to a run with other data or settings; {advice}") and advice in message
    shutil.rmtree(work)
    assert main(lower) == 0


def test_a_full_disk_stops_with_one_sentence_and_the_run_resumes_once_there_is_room(made, tmp_path, capsys):
    assert main(command("pretrain", made / "shop", tmp_path / "b")) == 0
    done = (tmp_path / "b.work/pretrain.latest.safetensors").read_bytes()
    blocked = tmp_path / "b.work/sft.latest.safetensors.partial"
    blocked.symlink_to(always_full())
    message = fails(capsys, *command("run", made / "shop", tmp_path / "b"))
    assert "is full" in message and "free some space" in message
    assert (tmp_path / "b.work/pretrain.latest.safetensors").read_bytes() == done
    assert not blocked.is_symlink()  # what was half written is gone, and with it the obstacle
    assert main(command("run", made / "shop", tmp_path / "b")) == 0
    ours, theirs = ((folder / "model/model.safetensors").read_bytes() for folder in (tmp_path / "b", made / "bundle"))
    assert ours == theirs


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_checkpoint_that_cannot_be_written_leaves_the_previous_one_intact(tmp_path, monkeypatch, number):
    network = torch.nn.Linear(3, 3)
    optimiser = torch.optim.AdamW(network.parameters())
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, network, optimiser, {"step": 1})
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.nn.init.zeros_(network.weight)

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError) as caught:
        save_checkpoint(path, network, optimiser, {"step": 2})
    assert str(caught.value).count(".") >= 1 and "\n" not in str(caught.value) and "again" in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert load_checkpoint(path, network, None) == {"step": 1}
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_a_full_disk_while_the_bundle_is_written_keeps_the_old_one(made, capsys, monkeypatch):
    version = Bundle.load(made / "bundle").version

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("serving.bundle_writer.save_file", full)
    message = fails(capsys, *command("run", made / "shop", made / "bundle", "name=tiny shop", "licence=CC0"))
    assert "The disk is full; free some space" in message
    assert Bundle.load(made / "bundle").version == version
