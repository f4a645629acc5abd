"""python -m app serve: reads the settings, then serves in one process or in several workers.

What takes long to import is imported in functions, behind the handler of signals: a service that is told to stop while
it starts ends in an orderly way, and as the first process of a container it would not hear of the signal at all.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.settings import Settings


def main(arguments: list[str] | None = None) -> int:
    """Runs the service until it is stopped. Returns the exit status."""
    end_at_once_on_signals()

    from pydantic import ValidationError

    from app import logs
    from app.settings import Settings, unknown_variables, variable

    given = vars(_parser().parse_args(arguments))
    given.pop("command")
    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        for found in error.errors():
            name = str(found["loc"][0]) if found["loc"] else ""
            where = f"--{name.replace('_', '-')} / {variable(name)}: " if name else ""
            print(where + found["msg"].removeprefix("Value error, "), file=sys.stderr)
        return 2
    logs.set_up(settings.log_level)
    for name in unknown_variables():
        logging.getLogger("streamrec").warning("unknown variable %s is ignored; --help lists the variables", name)
    if "FORWARDED_ALLOW_IPS" in os.environ and not settings.trusted_proxies:
        logging.getLogger("streamrec").warning("FORWARDED_ALLOW_IPS is ignored; set STREAMREC_TRUSTED_PROXIES")
    return serve(settings)


def end_at_once_on_signals() -> None:
    """Until those who serve have handlers of their own: nobody is connected, and there is nothing to finish."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))


def _parser() -> argparse.ArgumentParser:
    from app.settings import Settings, variable

    parser = argparse.ArgumentParser("python -m app", description="The streamrec service.")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "serve",
        help="serve a bundle",
        description="Serve a bundle. Each option can also be set by the environment variable in brackets.",
    )
    for name, field in Settings.model_fields.items():
        shown = field.default not in (None, (), "") and "Secret" not in str(field.annotation)
        default = f"; default {field.default}" if shown else ""
        command.add_argument(
            f"--{name.replace('_', '-')}",
            metavar=name.rpartition("_")[2].upper(),
            help=f"{field.description} [{variable(name)}{default}]".replace("%", "%%"),
        )
    return parser


def serve(settings: Settings) -> int:
    folder = settings.state_dir
    if folder is not None and settings.redis_url is None and (reason := unusable(folder)):
        print(
            f"The folder {folder} cannot keep the state ({reason}); choose another --state-dir, or give rights to it.",
            file=sys.stderr,
        )
        return 1
    try:
        listening = listen(settings.host, settings.port)
    except (OSError, UnicodeError) as error:
        wanted = f"{settings.host}, port {settings.port}"
        reason = getattr(error, "strerror", None) or "not a host"
        print(f"Cannot listen on {wanted} ({reason}); choose another --host or --port.", file=sys.stderr)
        return 1
    with listening:
        if settings.workers > 1:
            from app.supervisor import supervise

            return supervise(settings, listening)
        from app import server  # imports torch, which the supervisor of several workers does without

        return server.serve(settings, listening)


def unusable(folder: Path) -> str | None:
    """Why files cannot be written into a folder, which is made if it is not there; None if they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        return error.strerror or type(error).__name__
    return None


def listen(host: str, port: int) -> socket.socket:
    """The socket to accept connections from; on `::` it takes those of IPv4 as well, where the system can.

    Raises OSError or UnicodeError if there is no such address, or it is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)


if __name__ == "__main__":
    sys.exit(main())
