"""Settings: defaults, file and overrides, in this order; errors name the setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.config import RunConfig, StageConfig
from training.config_file import ConfigError, load_config, read_stored_config


def test_no_configuration_gives_the_defaults():
    assert load_config(None, []) == RunConfig()


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 7\nsft: {steps: 10, lr: 1e-4}\nevaluation:\n  steps: [0, 1]\n")
    config = load_config(file, ["sft.steps=20", "tokenizer.rqvae.levels=4", "model.step_form=token", "rl.lr=3e-5"])
    assert (config.seed, config.sft.steps, config.sft.lr, config.evaluation.steps) == (7, 20, 1e-4, (0, 1))
    assert (config.tokenizer.rqvae.levels, config.model.step_form, config.rl.lr) == (4, "token", 3e-5)
    untouched = config.sft.model_copy(update={"steps": RunConfig().sft.steps, "lr": RunConfig().sft.lr})
    assert untouched == RunConfig().sft


def test_an_empty_file_is_the_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "c.yaml", []) == RunConfig()


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rl"])
def test_a_stage_with_defaults_of_its_own_has_the_bounds_of_all_stages(stage):
    def refuses(section: type[StageConfig], name: str) -> bool:
        try:
            section.model_validate({name: -1})
        except ValueError:
            return True
        return False

    section = type(getattr(RunConfig(), stage))
    bounded = [name for name in StageConfig.model_fields if refuses(StageConfig, name)]
    assert {"steps", "lr", "weight_decay"} <= set(bounded)
    assert [name for name in bounded if not refuses(section, name)] == []


def test_every_setting_survives_json():
    config = load_config(None, ["evaluation.dense_weights=[0,0.5]"])
    stored = config.to_json()
    assert stored["evaluation"]["dense_weights"] == [0.0, 0.5]
    assert set(stored) == set(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sft.stepz=3", ["sft.stepz", "did you mean sft.steps?"]),
        ("nonsense=3", ["nonsense", "known here", "tokenizer"]),
        ("tokenizer.rqvae.level=3", ["tokenizer.rqvae.level;", "did you mean tokenizer.rqvae.levels?"]),
        ("sft.steps=many", ["sft.steps", "a whole number", "many"]),
        ("sft.steps=1.5", ["sft.steps", "a whole number", "1.5"]),
        ("sft.steps=true", ["sft.steps", "a whole number", "True"]),
        ("sft.lr=fast", ["sft.lr", "a number", "fast"]),
        ("sft.lr=.nan", ["sft.lr", "a finite number"]),
        ("sft.balanced=1", ["sft.balanced", "true or false"]),
        ("name=3", ["name", "text", "3"]),
        ("sft.inputs=guess", ["sft.inputs", "label, own", "guess"]),
        ("evaluation.steps=4", ["evaluation.steps", "list"]),
        ("evaluation.steps=[0,two]", ["evaluation.steps", "two"]),
        ("evaluation.steps=[0,9]", ["evaluation.steps", "model.max_steps"]),
        ("evaluation.steps=[]", ["evaluation.steps"]),
        ("lengths=[5]", ["lengths", "model.max_steps"]),
        ("model.max_steps=0", ["evaluation.steps", "model.max_steps"]),
        ("sft=3", ["sft", "keys and values"]),
        ("sft.steps", ["sft.steps", "key=value"]),
        ("sft.checkpoint_every=0", ["sft.checkpoint_every must be at least 1, not 0."]),
        ("model.dropout=1", ["model.dropout must be below 1, not 1."]),
        ("evaluation.dense_weights=[0,-1]", ["evaluation.dense_weights", "at least 0", "-1"]),
        ("rl.updates=3", ["rl.updates", "rl.checkpoint_every"]),
        ("rl.batch_size=0", ["batch_size"]),
        ("sft.steps=[1", ["YAML"]),
        ("tokenizer.rqvae.codes=0", ["codes"]),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(override, words):
    with pytest.raises(ValueError) as caught:
        load_config(None, [override])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_two_overrides_that_contradict_each_other_are_named():
    with pytest.raises(ConfigError, match="sft"):
        load_config(None, ["sft=3", "sft.steps=4"])


@pytest.mark.parametrize("content", ["- a list\n", "sft: 3\n", "{", "sft:\n  steps: {a: 1}\n"])
def test_a_malformed_file_is_refused(tmp_path, content):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "c.yaml", [])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml", [])


def test_without_reasoning_only_stage_1_may_train():
    plain = ["model.max_steps=0", "evaluation.steps=[0]"]
    with pytest.raises(ConfigError, match="sft.steps=0"):
        load_config(None, plain)
    assert load_config(None, [*plain, "sft.steps=0", "rl.steps=0"]).model.max_steps == 0


def test_a_stored_config_of_an_earlier_version_is_read_or_refused():
    stored = load_config(None, ["seed=3"]).to_json()
    stored["sft"] |= {"target": "item", "label_refresh": "every step"}  # settings of an earlier version
    stored["rl"]["rollouts"] = "sample"
    del stored["sft"]["distillation_weight"]
    assert read_stored_config(stored) == load_config(None, ["seed=3"])
    assert "target" in stored["sft"]  # what was given is left alone
    before = {"model.normalise": "vocabulary", "sft.apart": "false", "sft.entropy_floor": "0"}
    for name in before:  # there was no choice
        section, key = name.split(".")
        del stored[section][key]
    expected = load_config(None, ["seed=3", *(f"{name}={value}" for name, value in before.items())])
    assert read_stored_config(stored) == expected
    with pytest.raises(ConfigError, match=r"sft\.target=content is no longer supported, only item"):
        read_stored_config(stored | {"sft": {"target": "content"}})


def test_the_recipes_of_the_project_are_valid():
    root = Path(__file__).parents[2]
    for folder in ("training", "benchmarks"):
        assert [load_config(path, []) for path in sorted((root / folder).glob("*.yaml"))]
