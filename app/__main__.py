"""python -m app serve: settings from the command line and the environment, a server that drains before it stops."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import shlex
import socket
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from pydantic import ValidationError

from app import logs
from app.settings import Settings, unknown_variables, variable
from serving.errors import BundleError

if TYPE_CHECKING:  # imports torch: not before the settings are known to be sound
    from app.service import Service


def main(arguments: list[str] | None = None) -> int:
    """Runs the service until it is told to stop. Returns the process's exit status."""
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
        logging.getLogger("streamrec").warning("nothing reads the variable %s; see --help for those that exist", name)
    return serve(settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m app", description="The streamrec service.")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "serve", help="serve a bundle", description="Serve a bundle. Every option may be set by its variable instead."
    )
    for name, field in Settings.model_fields.items():
        shown = field.default not in (None, ()) and "Secret" not in str(field.annotation)
        default = f"; default {field.default}" if shown else ""
        command.add_argument(
            f"--{name.replace('_', '-')}",
            metavar=name.rpartition("_")[2].upper(),
            help=f"{field.description} [{variable(name)}{default}]".replace("%", "%%"),
        )
    return parser


def serve(settings: Settings) -> int:
    from app.main import create_app

    failure: list[BaseException] = []

    def on_failure(error: BaseException) -> None:
        failure.append(error)
        server.should_exit = True

    app = create_app(settings, None, lambda service: _announce(service, server), on_failure)
    service: Service = app.state.service
    config = uvicorn.Config(
        app, settings.host, settings.port, log_config=None, access_log=False, lifespan="on",
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
    )  # fmt: skip
    server = Server(config, service)
    server.run()
    if failure:
        kind = "" if isinstance(failure[0], BundleError) else f"{type(failure[0]).__name__}: "
        print(f"{kind}{failure[0]}", file=sys.stderr)
        return 1
    return 0 if server.started else 1


class Server(uvicorn.Server):
    """Stops in order: not ready, then what runs is finished while the probes still answer, then the sockets close."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service, self.draining = service, False
        self.loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not super's: it closes the sockets at once, and in the end raises the signal again instead of exiting with 0.
        if self.draining:
            self.should_exit = self.force_exit = True  # asked twice
            return
        self.draining = True
        self.service.begin_drain()
        if self.loop is None:
            self.should_exit = True
        else:
            self.loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain()))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def _drain(self) -> None:
        try:
            await self.service.drain()
        finally:
            self.should_exit = True


def _announce(service: Service, server: uvicorn.Server) -> None:
    """Tells a person where the page is, and gives a request that works."""
    from serving.types import Rules

    while not server.started and not server.should_exit:
        time.sleep(0.01)
    host, port = server.config.host, server.config.port
    for listening in server.servers:
        host, port = listening.sockets[0].getsockname()[:2]
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    catalogue, steps = service.bundle.catalogue, service.bundle.max_steps
    history = [catalogue.item_ids[row] for row in catalogue.popular(1, Rules())]
    body = json.dumps({"user_id": "me", "history": history, "k": 5}, ensure_ascii=False)
    curl = f"curl -s '{address}/recommend?reasoning_steps={steps}' -H 'Content-Type: application/json' -d "
    print(
        f"Ready: {address}/ (try it), {address}/docs (the API). A first request:\n{curl}{shlex.quote(body)}", flush=True
    )


if __name__ == "__main__":
    sys.exit(main())
