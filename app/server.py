"""One process that serves: uvicorn around the application, with graceful shutdown. Alone, or one of several workers."""

from __future__ import annotations

import asyncio
import faulthandler
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
from app.lifecycle import Service
from app.main import create_app
from app.settings import Settings
from app.slot import WorkerSlot
from serving.errors import ServingError
from serving.types import Rules

# Seconds that an idle connection stays open: longer than clients and proxies keep theirs (5 to 60 by default), or they
# would send on one that is just being closed, and see a reset instead of an answer.
KEEP_ALIVE_S = 75
EXIT_GRACE_S = 5.0  # beyond the drain timeout, for a worker whose engine is dead


def serve(settings: Settings, listening: socket.socket, slot: WorkerSlot | None = None) -> int:
    """Serves on the socket until told to stop. Returns the exit status. slot: of a worker, one of several."""
    if slot is not None:
        logs.set_up(settings.log_level)  # a fresh process
    failures: list[BaseException] = []

    def on_ready(service: Service) -> None:
        if slot is not None:
            slot.report_state("ready")
        if slot is None or (slot.number == 0 and not slot.is_replacement):
            threading.Thread(target=_announce, args=(service, listening, slot), daemon=True).start()

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    def on_death(error: BaseException) -> None:
        # A single process stays, so that its probes can say why. One of several is replaced at once.
        if slot is not None:
            failures.append(error)
            server.should_exit = True
            # A thread that hangs outside Python can hang the interpreter's end as well: then it is cut short.
            faulthandler.dump_traceback_later(settings.drain_timeout_s + EXIT_GRACE_S, exit=True)

    app = create_app(settings, None, on_ready, on_failure, on_death, slot)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="on", server_header=False, http="httptools",
        loop="asyncio" if sys.platform == "win32" else "uvloop",
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)), timeout_keep_alive=KEEP_ALIVE_S,
        proxy_headers=False,  # create_app reads them, of the proxies that the settings name
    )  # fmt: skip
    server = Server(config, app.state.service, slot)
    server.run([listening])
    if failures:
        logs.flush()
        if slot is None or slot.number == 0:  # all workers fail for the same reason
            kind = "" if isinstance(failures[0], ServingError) else f"{type(failures[0]).__name__}: "
            print(f"{kind}{failures[0]}", file=sys.stderr)
        return 1
    return 0 if server.started else 1


class Server(uvicorn.Server):
    """Stops gracefully: first not ready, then running requests finish while the probes still answer, then the sockets
    close. uvicorn's own handler would close them at once, and exit with the signal instead of 0."""

    def __init__(self, config: uvicorn.Config, service: Service, slot: WorkerSlot | None) -> None:
        super().__init__(config)
        self.service, self.slot, self.draining = service, slot, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.slot is not None and sig == signal.SIGINT:
            return  # a terminal sends Ctrl-C to every process; the supervisor stops the workers
        if self.draining:
            self.should_exit = self.force_exit = True  # the second signal: stop now
            return
        self.draining = True
        self.service.begin_drain()
        if self.slot is not None:
            self.slot.report_state("draining")
        asyncio.get_running_loop().call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain()))

    async def _drain(self) -> None:
        try:
            await self.service.drain()
        finally:
            self.should_exit = True


def _announce(service: Service, listening: socket.socket, slot: WorkerSlot | None) -> None:
    """Prints where the page is, and a request that works, once every worker is ready."""
    while slot is not None and slot.blocking_state():
        if service.status != "ready":
            return
        time.sleep(0.01)
    host, port = listening.getsockname()[:2]
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    catalogue, steps = service.bundle.catalogue, service.bundle.max_steps
    history = [catalogue.item_ids[row] for row in catalogue.popular(1, Rules())]
    body = json.dumps({"user_id": "me", "history": history, "k": 5}, ensure_ascii=False)
    curl = f"curl -s '{address}/recommend?reasoning_steps={steps}' -H 'Content-Type: application/json' -d "
    print(
        f"Ready: {address}/ (try it), {address}/docs (the API). A first request:\n{curl}{shlex.quote(body)}", flush=True
    )
