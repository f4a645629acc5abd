"""Takes a question from the command line to what answers it."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from pathlib import Path

import torch

from benchmarks.accuracy import __doc__ as about
from benchmarks.accuracy.commands import COMMANDS, command_of
from benchmarks.accuracy.questions import current_name
from benchmarks.common import ROOT, result_file


def listed(indent: int = 16, width: int = 120) -> str:
    """The questions, one after the other, as --help prints them."""
    entries = (
        textwrap.fill(
            f"{name:<{indent - 2}}{command.about}", width, initial_indent="  ", subsequent_indent=" " * indent
        )
        for name, command in COMMANDS.items()
    )
    return "questions:\n" + "\n".join(entries)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=about, epilog=listed(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("question", metavar="QUESTION", choices=tuple(COMMANDS), type=current_name, help="listed below")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder of the trained variants; default: runs/accuracy-NAME")
    parser.add_argument("--out", type=result_file, help="default: benchmarks/results/QUESTION-NAME.json")
    parser.add_argument("--only", help="train one variant (of whole runs: and measure it) without writing a result")
    parser.add_argument("--config", type=Path)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="device that trains and ranks (default: %(default)s)"
    )
    parser.add_argument("--seeds", default="0", help="comma-separated; whole runs take --set seed=N instead")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    name = options.data.resolve().name
    options.work = options.work or ROOT / "runs" / f"accuracy-{name}"
    options.out = options.out or ROOT / f"benchmarks/results/{options.question}-{name}.json"
    return COMMANDS[options.question].answer(parser, options, command_of(options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
