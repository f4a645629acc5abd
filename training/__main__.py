"""`python -m training`: get data, train a bundle stage by stage or in one go, evaluate a bundle."""

from __future__ import annotations

import argparse
import errno
import json
import sys
from pathlib import Path

from safetensors import SafetensorError

from serving.bundle import Bundle
from serving.errors import ServingError
from serving.types import REDIS_PREFIX
from training.config_file import ConfigError, load_config
from training.data.cli import add_data_commands
from training.data.read import read_data
from training.data.shop import write_demo_shop
from training.evaluate import evaluate_bundle
from training.pipeline import STAGES, run
from training.preflight import RunError
from training.stages.begin import CollapseError
from training.update import update

HELP = {
    "run": "every stage, from data to bundle",
    "prepare": "read, check and split the data",
    "tokenize": "prepare, then make semantic IDs",
    "pretrain": "all up to stage 1, in which the network learns to name items without reasoning",
    "sft": "all up to stage 2, in which it learns to reason before it names an item",
    "rl": "all up to stage 3, in which it learns from rewards for its own reasoning",
    "export": "all up to the bundle with its measured accuracy: the same as run",
}

SET = "settings that differ from the defaults and the file, such as sft.steps=500"
DISK_FULL = "The disk is full; free some space and run the same command again."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_data_commands(commands)
    for name in ("run", *STAGES):
        command = commands.add_parser(name, help=HELP[name], description=f"{HELP[name][0].upper()}{HELP[name][1:]}.")
        _add_run_arguments(command)
        command.add_argument("--config", type=Path, help="YAML file of settings")
        command.set_defaults(run=_run)
    command = commands.add_parser(
        "update", help="the next version of a bundle: new items, and training that goes on with new interactions"
    )
    command.add_argument("--bundle", type=Path, required=True, help="the bundle to go on from; it stays as it is")
    _add_run_arguments(command)
    command.add_argument(
        "--changes",
        metavar="SOURCE",
        help="STREAMREC_STATE_DIR, or the address of the Redis, of the service whose added items keep their codes",
    )
    command.add_argument(
        "--redis-prefix", default=REDIS_PREFIX, help="as STREAMREC_REDIS_PREFIX (default: %(default)s)"
    )
    command.set_defaults(run=_update)
    command = commands.add_parser(
        "demo", help="make bundles/demo: generate the shop, then run every stage (training/demo.yaml)"
    )
    command.add_argument("--out", type=Path, default=Path("bundles/demo"), help="folder of the bundle (%(default)s)")
    command.add_argument("--work", type=Path, default=Path("runs/demo"), help="folder of the shop and of the training")
    command.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help=SET)
    command.set_defaults(run=_demo)
    command = commands.add_parser("evaluate", help="full ranking with a bundle, one JSON object per number of steps")
    command.add_argument("--bundle", type=Path, required=True, help="folder of the bundle")
    command.add_argument("--data", type=Path, required=True, help="the data folder that it was trained on")
    command.add_argument("--steps", default="", help="such as 0,2,4; default: every number the bundle supports")
    command.add_argument("--split", choices=("valid", "test"), default="valid", help="(%(default)s)")
    command.add_argument("--beam", type=int, default=50, help="beam width of the search (%(default)s)")
    command.add_argument("--paths", type=int, help="reasoning paths to keep; default: the bundle's")
    command.add_argument("--users", type=int, default=0, help="number of users, drawn with a fixed seed; 0: all")
    command.add_argument(
        "--exclude-seen", action="store_true", help="exclude the items of the history, as the service does"
    )
    command.set_defaults(run=_evaluate)
    options = parser.parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError, RunError, CollapseError, ServingError, FloatingPointError, SafetensorError) as error:
        print(f"streamrec: {DISK_FULL if _disk_is_full(error) else error}", file=sys.stderr)
        return 2


def _add_run_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data",
        required=True,
        help="folder with interactions (.csv, .csv.gz, .parquet or .inter) and, where items have text, "
        "items.jsonl[.gz]; or a service's feedback: its folder, or the address of the Redis",
    )
    command.add_argument(
        "--out", type=Path, required=True, help="folder of the bundle; checkpoints and logs go to OUT.work"
    )
    command.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help=SET)
    command.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="device that trains (default: %(default)s)"
    )


def _disk_is_full(error: Exception) -> bool:
    """Python reports a full disk by error number, safetensors only in the text."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)


def _run(options: argparse.Namespace) -> None:
    until = "export" if options.command == "run" else options.command
    run(options.data, options.out, load_config(options.config, options.set), until, device=options.device)


def _update(options: argparse.Namespace) -> None:
    update(
        options.bundle, options.data, options.out, options.set, options.changes, options.redis_prefix, options.device
    )


def _demo(options: argparse.Namespace) -> None:
    shop = options.work / "shop"
    write_demo_shop(shop)
    config = load_config(Path(__file__).with_name("demo.yaml"), options.set)
    run(shop, options.out, config, work_folder=options.work / "training")


def _evaluate(options: argparse.Namespace) -> None:
    bundle = Bundle.load(options.bundle)
    try:
        steps = [int(part) for part in options.steps.split(",")] if options.steps else list(range(bundle.max_steps + 1))
    except ValueError as error:
        raise ConfigError(f"--steps takes numbers such as 0,2,4, not {options.steps!r}.") from error
    if not all(0 <= number <= bundle.max_steps for number in steps):
        raise ConfigError(f"--steps must lie in 0..{bundle.max_steps}, the range of this bundle.")
    if options.paths is not None and options.paths < 1:
        raise ConfigError(f"--paths takes a number from 1 on, not {options.paths}.")
    if options.beam < 1 or options.users < 0:
        raise ConfigError(f"--beam starts at 1 and --users at 0, not {options.beam} and {options.users}.")
    data = read_data(options.data)
    for row in evaluate_bundle(
        bundle, data, steps, options.split, options.beam, options.users, options.exclude_seen, options.paths
    ):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
