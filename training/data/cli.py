"""The commands `data amazon-2023`, `data shop`, `data feedback` and `data stats`.

Each sets `run`, to be called with the parsed arguments. Errors in the data are DataError or ValueError, with one
sentence for the user.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from serving.online.feedback import EVENTS, POSITIVE
from serving.types import REDIS_PREFIX
from training.data.download import AMAZON_2023, amazon_2023
from training.data.feedback import convert_feedback
from training.data.prepare import chronological, describe, leave_one_out, time_quantiles
from training.data.read import read_data
from training.data.shop import write_shop


def add_data_commands(subparsers: Any) -> None:
    """Add `data` with its commands to what `ArgumentParser.add_subparsers()` returned."""
    data = subparsers.add_parser("data", help="download, generate or inspect a data folder")
    commands = data.add_subparsers(dest="data_command", required=True)

    amazon = commands.add_parser(
        "amazon-2023", help="download a category of Amazon Reviews 2023 (5-core, with item text)"
    )
    amazon.add_argument("name", help="category, e.g. Musical_Instruments")
    amazon.add_argument("--out", type=Path, required=True, help="data folder to write")
    amazon.add_argument("--base-url", default=AMAZON_2023, help="server of the files (default: %(default)s)")
    amazon.set_defaults(run=_amazon)

    shop = commands.add_parser("shop", help="generate a shop of any size, with a known best possible recall")
    shop.add_argument("--users", type=int, default=4000, help="default: %(default)s")
    shop.add_argument("--items", type=int, default=1000, help="default: %(default)s")
    shop.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    shop.add_argument("--format", choices=("csv.gz", "parquet"), default="csv.gz", help="default: %(default)s")
    shop.add_argument("--out", type=Path, required=True, help="data folder to write")
    shop.set_defaults(run=_shop)

    feedback = commands.add_parser("feedback", help="make what people did with a service's recommendations into data")
    feedback.add_argument("source", help="folder `feedback` under STREAMREC_STATE_DIR, or the address of the Redis")
    feedback.add_argument("--out", type=Path, required=True, help="data folder to write")
    feedback.add_argument(
        "--events",
        type=lambda text: text.split(","),
        default=POSITIVE,
        help=f"events to keep, of {', '.join(EVENTS)}; default: {','.join(POSITIVE)}",
    )
    feedback.add_argument(
        "--redis-prefix", default=REDIS_PREFIX, help="as STREAMREC_REDIS_PREFIX (default: %(default)s)"
    )
    feedback.set_defaults(run=_feedback)

    stats = commands.add_parser("stats", help="check a data folder and print its statistics")
    stats.add_argument("folder", type=Path, help="data folder to read")
    stats.add_argument(
        "--split",
        choices=("leave-one-out", "chronological"),
        nargs="?",
        const="leave-one-out",
        help="also print the sizes of a split (chronological: at 80%% and 90%% of the events)",
    )
    stats.set_defaults(run=_stats)


def _amazon(args: argparse.Namespace) -> None:
    counts = amazon_2023(args.name, args.out, args.base_url)
    print(describe(read_data(args.out)))
    if counts["items_without_metadata"]:
        print(f"  note: {counts['items_without_metadata']:,} items have no metadata and so no text")


def _shop(args: argparse.Namespace) -> None:
    with tqdm(total=args.users, desc="shop", unit=" users") as bar:
        truth = write_shop(args.out, args.users, args.items, args.seed, args.format, bar.update)
    best = ", ".join(f"{name} {value:.4f}" for name, value in truth["best"].items())
    print(f"{args.out}: {args.users:,} users, {args.items:,} items; best possible: {best}")


def _feedback(args: argparse.Namespace) -> None:
    counts = convert_feedback(args.source, args.out, args.events, args.redis_prefix)
    print(f"{args.out}: " + ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())))


def _stats(args: argparse.Namespace) -> None:
    data = read_data(args.folder)
    split = None
    if args.split == "leave-one-out":
        split = leave_one_out(data)
    elif args.split == "chronological":
        split = chronological(data, *time_quantiles(data, 0.8, 0.9))
    print(describe(data, split))
