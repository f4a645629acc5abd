"""`--help` of every command says what each option is for, and states no default that is empty."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import pytest

import app.__main__ as app_command
import serving.__main__ as serving_command
import training.__main__ as training_command
from training.pipeline import STAGES


class Caught(Exception):
    """The parser of a command, where it would have read the arguments."""


def parser_of(main: Callable[[list[str]], object], monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    def catch(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Caught(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", catch)
    with pytest.raises(Caught) as caught:
        main([])
    parser: argparse.ArgumentParser = caught.value.args[0]
    return parser


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options(command)
        else:
            yield action


@pytest.mark.parametrize("command", [training_command, serving_command], ids=["training", "serving"])
def test_every_option_says_what_it_is_for(command: object, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = parser_of(command.main, monkeypatch)  # type: ignore[attr-defined]
    assert [action.option_strings or action.dest for action in options(parser) if not action.help] == []


def test_every_stage_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = parser_of(training_command.main, monkeypatch)
    (commands,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    assert {choice.dest for choice in commands._choices_actions} >= {"run", *STAGES}
    assert len(set(training_command.HELP.values())) == len(STAGES) + 1


def test_the_service_states_a_default_only_where_there_is_one() -> None:
    texts = [action.help or "" for action in options(app_command._parser())]
    assert len(texts) > 40 and all(texts)
    assert [text for text in texts if text.endswith("default ]")] == []
    assert any("[STREAMREC_PORT; default 8000]" in text for text in texts)
