"""Every question that `python -m benchmarks.accuracy` takes, once: its name, what it compares, and what answers it.

--help lists them from here, and `benchmarks/readme_tables.py` writes the table in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.accuracy import (
    compare_back,
    compare_interleaved,
    compare_newest,
    compare_views,
    compare_walk,
    questions,
    whole_runs,
)

# From parser, options and the command that the record names: trains what is missing, writes the result, prints it.
Answer = Callable[[argparse.ArgumentParser, argparse.Namespace, str], int]


@dataclass(frozen=True, slots=True)
class Command:
    about: str
    answer: Answer


COMMANDS: dict[str, Command] = {
    **{name: Command(about, whole_runs.answer) for name, about in whole_runs.QUESTIONS.items()},
    "newest": Command(
        "learning from the newest events before serving (`refit.epochs`), by the network, the memory and both mixed",
        compare_newest.answer,
    ),
    **{name: Command(question.about, questions.answer) for name, question in questions.QUESTIONS.items()},
    "interleaved": Command(
        "steps between an item's tokens, against the same weights without steps, pauses in the same place, plain "
        "training, and as many steps given by lot",
        compare_interleaved.answer,
    ),
    "views": Command(
        "one network of several trees of semantic IDs, its answers through each of them alone and merged, against a "
        "plain network, a wider beam, and, if the views gain on validation, networks of a tree each and seeds of one "
        "tree, all given as many training steps",
        compare_views.answer,
    ),
    "walk": Command(
        "reasoning steps that read the item memory and follow the item graph, on a converged network that stays as it "
        "is, against the memory joined once, a fixed second hop, frozen reads, pauses and a shuffled graph",
        compare_walk.answer,
    ),
    "back": Command(
        "reasoning steps that fetch from the user's older history what matters to the state, on a converged network "
        "that stays as it is, against the recent history alone, a longer one encoded at once, the older items in one "
        "read (newest first or all equally), another user's, and pauses; each also mixed with the item memory",
        compare_back.answer,
    ),
}


def command_of(options: argparse.Namespace) -> str:
    """The command without what changes no figure: its folders."""
    command = f"python -m benchmarks.accuracy {options.question} --data {options.data}"
    command += f" --config {options.config}" if options.config else ""
    command += f" --seeds {options.seeds}" if options.seeds != "0" else ""
    command += "".join(f" --set {entry}" for entry in options.set)
    return command + (f" --device {options.device}" if options.device != "cpu" else "")
