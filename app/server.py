"""One process that serves: uvicorn around the application, with an end in good order. Alone, or one of several."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import socket
import sys
import threading
import time
from types import FrameType

import uvicorn

from app import logs
from app.gate import Door
from app.lifecycle import Service
from app.main import create_app
from app.settings import Settings
from app.slot import WorkerSlot
from serving.errors import BundleError
from serving.types import Rules

# Seconds that an idle connection stays open: longer than clients and proxies keep theirs (5 to 60 by default), or they
# would send on one that is just being closed, and see a reset instead of an answer.
KEEP_ALIVE = 75


def serve(settings: Settings, listening: socket.socket | None = None, slot: WorkerSlot | None = None) -> int:
    """Serves until told to stop. Returns the exit status. `listening` and `slot`: of a worker among several."""
    if slot is not None:
        logs.set_up(settings.log_level)  # a fresh process
    failures: list[BaseException] = []

    def on_ready(service: Service) -> None:
        if slot is not None:
            slot.report_state("ready")
        if slot is None or (slot.number == 0 and not slot.is_replacement):
            threading.Thread(target=_announce, args=(service, server, slot), daemon=True).start()

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    def on_death(error: BaseException) -> None:
        # Alone, it stays and tells the probes. Among several, another takes its place at once.
        if slot is not None:
            failures.append(error)
            server.should_exit = True

    app = create_app(settings, None, on_ready, on_failure, on_death, slot)
    config = uvicorn.Config(
        app, settings.host, settings.port, log_config=None, access_log=False, lifespan="on", server_header=False,
        http=Door, loop="asyncio" if sys.platform == "win32" else "uvloop",
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)), timeout_keep_alive=KEEP_ALIVE,
    )  # fmt: skip
    server = Server(config, app.state.service, slot)
    server.run([listening] if listening is not None else None)
    if failures:
        logs.flush()
        if slot is None or slot.number == 0:  # all of them say the same
            kind = "" if isinstance(failures[0], BundleError) else f"{type(failures[0]).__name__}: "
            print(f"{kind}{failures[0]}", file=sys.stderr)
        return 1
    return 0 if server.started else 1


class Server(uvicorn.Server):
    """Stops in order: not ready, then what runs is finished while the probes still answer, then the sockets close."""

    def __init__(self, config: uvicorn.Config, service: Service, slot: WorkerSlot | None) -> None:
        super().__init__(config)
        self.service, self.slot, self.draining = service, slot, False
        self.loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not super's: it closes the sockets at once, and in the end raises the signal again instead of exiting with 0.
        if self.slot is not None and sig == signal.SIGINT:
            return  # a terminal's Ctrl-C reaches everybody; the supervisor tells the workers
        if self.draining:
            self.should_exit = self.force_exit = True  # asked twice
            return
        self.draining = True
        self.service.begin_drain()
        if self.slot is not None:
            self.slot.report_state("draining")
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


def _announce(service: Service, server: Server, slot: WorkerSlot | None) -> None:
    """Tells a person where the page is, and gives a request that works."""
    while not server.started or (slot is not None and slot.blocking_state()):
        if server.should_exit:
            return
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
