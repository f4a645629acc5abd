"""The `streamrec` command: one name for the programs of app, training and serving.

`streamrec serve` is `python -m app serve`, and so on. It imports the package that a command needs and no other, so
serving a bundle never loads the training code.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
# Command: the package whose __main__ runs it, the command's name there, and what it does.
COMMANDS = {
    "serve": ("app", "serve", "answer recommendations over HTTP"),
    "train": ("training", "run", "make a bundle from a data folder"),
    "evaluate": ("training", "evaluate", "measure a bundle for several numbers of reasoning steps"),
    "score": ("serving", "score", "write recommendations for every user of a file"),
}
NEEDS = {"app": ("serving", "app"), "training": ("serving", "training"), "serving": ("serving",)}
EXTRAS = {"training": "[training]", "serving": "[ray]"}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Returns its exit status; 2 where it cannot be started."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if command not in COMMANDS and command != "--version":
        print(f"streamrec: there is no command {command!r}; choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    package, name, _ = COMMANDS.get(command, ("serving", "", ""))
    if shadow := _shadow(package):
        print(f"streamrec: {shadow}", file=sys.stderr)
        return 2
    if command == "--version":
        print(f"streamrec {importlib.import_module('serving').__version__}")
        return 0
    try:
        program = importlib.import_module(f"{package}.__main__")
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(package, "")
        print(
            f"streamrec: {command} needs {error.name}, which is not installed; run: pip install 'streamrec{extra}'",
            file=sys.stderr,
        )
        return 2
    return int(program.main([name, *rest]) or 0)


def _help() -> str:
    lines = [f"  {command:10}{text}" for command, (_, _, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: streamrec COMMAND [OPTIONS]", "", *lines, "", "`streamrec COMMAND --help` lists a command's options."]
    )


def _shadow(package: str) -> str | None:
    """One sentence where another package has the name of one of ours: `app` and `training` are common names."""
    for name in NEEDS[package]:
        spec = importlib.util.find_spec(name)
        found = spec and spec.origin and Path(spec.origin).resolve().parent
        if not found:
            return f"the package {name!r} is missing; install streamrec again."
        if found.parent != HERE:
            return (
                f"the package {name!r} at {found} hides streamrec's own at {HERE / name}; "
                "remove it from PYTHONPATH or install streamrec in an environment of its own."
            )
    return None


if __name__ == "__main__":
    sys.exit(main())
