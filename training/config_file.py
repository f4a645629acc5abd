"""Settings of training as they are read: from YAML, `--set` and earlier runs, and in words where they do not fit."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from training.config import RunConfig


class ConfigError(ValueError):
    """A setting that does not exist or does not fit; the message names it."""


def load_config(path: Path | None, overrides: Sequence[str]) -> RunConfig:
    """The defaults, then a YAML file, then `key.key=value` overrides. Raises ConfigError naming the wrong key."""
    try:
        data = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path else {}
    except yaml.YAMLError as error:
        raise _not_yaml(error) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The configuration {path} is not UTF-8 text ({error.reason}).") from error
    except OSError as error:
        raise ConfigError(
            f"The configuration {path} cannot be read ({error.strerror}); give an existing file."
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold keys and values, such as `sft: {{steps: 100}}`.")
    return override_config(data, overrides)


def override_config(data: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    """Plain values, changed by `key.key=value` overrides. Raises ConfigError naming the wrong key."""
    try:
        for override in overrides:
            key, separator, value = override.partition("=")
            if not separator:
                raise ConfigError(f"--set {override}: write key=value, such as sft.steps=100.")
            *parents, last = key.strip().split(".")
            node = data
            for parent in parents:
                node = node.setdefault(parent, {})
                if not isinstance(node, dict):
                    raise ConfigError(f"--set {override}: {parent} holds the value {node!r} already, not settings.")
            node[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise _not_yaml(error) from error
    return read_config(data)


def _not_yaml(error: yaml.YAMLError) -> ConfigError:
    return ConfigError(f"The configuration is not valid YAML: {str(error).splitlines()[0]}.")


def read_config(data: Any) -> RunConfig:
    """Settings from plain values, defaults where there are none. Raises ConfigError naming the wrong key."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_sentence(error.errors()[0])) from error


# Settings that left the code because they gained nothing, with the value that stayed.
RETIRED = {("sft", "target"): "item", ("sft", "label_refresh"): "every step", ("rl", "rollouts"): "sample"}
# Settings of the final choice that left with what they chose: whatever a stored run had, its stages are the same.
DROPPED = (("neighbours", "floor"), ("evaluation", "neighbours_weights"))
# Settings that are younger than some stored runs, with what the code did before them, where that is not the default.
BEFORE: dict[tuple[str, str], Any] = {
    ("model", "normalise"): "vocabulary",
    ("evaluation", "exclude_seen"): False,
    ("sft", "apart"): False,
    ("sft", "entropy_floor"): 0.0,
    ("rl", "policy_share"): 0.0,
    ("rl", "inside_trie"): False,
    ("rl", "standardise"): "sum",
    ("rl", "answer_reward"): 0.0,
}


def read_stored_config(data: dict[str, Any]) -> RunConfig:
    """The settings of an earlier run. Those it did not know yet have what was done before there was a choice; retired
    ones must have had the value that stayed, unless they only concerned the final choice. Raises ConfigError otherwise.
    """
    data = json.loads(json.dumps(data))
    for (section, name), before in BEFORE.items():
        data.setdefault(section, {}).setdefault(name, before)
    for section, name in DROPPED:
        data.get(section, {}).pop(name, None)
    for (section, name), kept in RETIRED.items():
        if name in data.get(section, {}) and (value := data[section].pop(name)) != kept:
            raise ConfigError(f"{section}.{name}={value} is no longer supported, only {kept}.")
    return read_config(data)


EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "keys and values",
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "model_type": "keys and values",
    "string_type": "text",
    "too_short": "a list of at least one number",
    "tuple_type": "a list",
}
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _sentence(error: ErrorDetails) -> str:
    """What is wrong with one setting, by its full name, and what would be right."""
    path = [str(part) for part in error["loc"] if isinstance(part, str)]
    where, value, context = ".".join(path) or "The configuration", error["input"], error.get("ctx", {})
    if error["type"] == "value_error":  # of a validator above, which names its settings
        return str(context["error"])
    if error["type"] == "extra_forbidden":
        return _unknown(path)
    if any(isinstance(part, int) for part in error["loc"]):
        where = f"Every entry of {where}"
    limit = next((f"{words} {context[name]:g}" for name, words in LIMITS.items() if name in context), None)
    choices = str(context.get("expected", "")).replace(" or ", ", ").replace("'", "")
    one_of = f"one of {choices}" if error["type"] == "literal_error" else None
    expected = limit or one_of or EXPECTED.get(error["type"])
    if expected is None:
        return f"{where}: {error['msg']}, not {value!r}."
    return f"{where} must be {expected}, not {value!r}."


def _unknown(path: list[str]) -> str:
    section: Any = RunConfig
    for name in path[:-1]:
        section = section.model_fields[name].annotation
    known, parents = list(section.model_fields), path[:-1]
    nearest = difflib.get_close_matches(path[-1], known, 1)
    if nearest:
        return f"There is no setting {'.'.join(path)}; did you mean {'.'.join([*parents, *nearest])}?"
    return f"There is no setting {'.'.join(path)}; known here: {', '.join(known)}."
