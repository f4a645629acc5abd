"""One process that serves: uvicorn behind the guard, with graceful shutdown. Alone, or one of several workers."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import logging
import os
import resource
import shlex
import signal
import socket
import sys
import threading
import time
from functools import partial
from types import FrameType

import uvicorn

from app import logs
from app.guard import Bounds, Connections, Guard
from app.lifecycle import Service
from app.main import create_app
from app.settings import Settings
from app.slot import SAME_SIGNAL_S, WorkerSlot
from serving.errors import ServingError
from serving.types import Rules

log = logging.getLogger("streamrec.server")

FILES_KEPT = 128  # file descriptors for everything but connections
CLOSE_S = 3.0  # for closing files and connections once requests are finished or given up
_DEV_NULL = open(os.devnull, "w")  # open as long as the process lives


def serve(settings: Settings, listening: socket.socket, slot: WorkerSlot | None = None) -> int:
    """Serves on the socket until told to stop. Returns the exit status. slot: of a worker, one of several."""
    if slot is not None:
        logs.set_up(settings.log_level)  # a fresh process
    failures: list[BaseException] = []

    def on_ready(service: Service) -> None:
        if slot is not None:
            slot.report_state("ready")
        threading.Thread(target=_announce, args=(service, listening, slot), daemon=True).start()

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    def on_death(error: BaseException) -> None:
        # A single process stays, so that its probes can say why. One of several is replaced at once.
        if slot is not None:
            failures.append(error)
            server.should_exit = True
            end_within(settings.drain_timeout_s + CLOSE_S)

    app = create_app(settings, None, on_ready, on_failure, on_death, slot)
    service: Service = app.state.service
    connections = Connections(bounds(settings), lambda reason: service.metrics.rejections(reason).inc())
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="on", server_header=False,
        http=partial(Guard, connections), ws="none",  # type: ignore[arg-type]  # what makes the protocol need be no class
        loop="uvloop", timeout_graceful_shutdown=1,
        proxy_headers=False,  # create_app reads them, of the proxies that the settings name
    )  # fmt: skip
    server = Server(config, service, connections, slot)
    server.run([listening])
    if failures:
        logs.flush()
        if slot is None or slot.number == 0 or slot.is_replacement:  # at the start all fail alike
            kind = "" if isinstance(failures[0], ServingError) else f"{type(failures[0]).__name__}: "
            print(f"{kind}{failures[0]}", file=sys.stderr)
        return 1
    return 0 if server.started else 1


def bounds(settings: Settings) -> Bounds:
    """What the guard permits: the settings, and no more connections than the process may open files. A process that may
    raise its limit for them does."""
    connections = settings.max_connections
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited, wanted = resource.RLIM_INFINITY, connections + FILES_KEPT
    if files != unlimited and files < wanted and files != most:
        files = wanted if most == unlimited else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    if files != unlimited and files < wanted:
        connections = max(1, files - FILES_KEPT)
        log.warning("the limit of %d open files leaves room for %d connections; raise it with ulimit -n",
                    files, connections)  # fmt: skip
    return Bounds(
        head_bytes=settings.max_head_bytes,
        head_fields=settings.max_head_fields,
        head_timeout=settings.head_timeout_s,
        body_timeout=settings.body_timeout_s,
        connections=connections,
        unfinished_bytes=settings.max_unfinished_bytes,
    )


class Server(uvicorn.Server):
    """Stops gracefully: first not ready, then running requests finish while the probes still answer, then the sockets
    close. uvicorn's own handler would close them at once, and exit with the signal instead of 0.

    All of it has one deadline, `drain_timeout_s` after the signal. Then the requests that still run are answered 503,
    and CLOSE_S later the process ends, whatever hangs.
    """

    def __init__(
        self, config: uvicorn.Config, service: Service, connections: Connections, slot: WorkerSlot | None
    ) -> None:
        super().__init__(config)
        self.service, self.connections, self.slot = service, connections, slot
        self.stopping_since: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._sweeping = asyncio.ensure_future(self.connections.keep_limits())
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.slot is not None and sig == signal.SIGINT:
            return  # a terminal sends Ctrl-C to every process; the supervisor stops the workers
        if self.stopping_since is None:
            self.stopping_since = time.monotonic()
            end_within(self.service.settings.drain_timeout_s + CLOSE_S)
            asyncio.get_running_loop().call_soon_threadsafe(self._begin_drain)
        elif self.slot is None and time.monotonic() - self.stopping_since > SAME_SIGNAL_S:
            self.should_exit = self.force_exit = True  # stop now

    def _begin_drain(self) -> None:
        if self.service.status in ("loading", "warming", "replaying"):
            logs.flush()
            os._exit(0)  # there is nothing to finish, and the thread that loads cannot be stopped
        self.service.begin_drain()
        self.connections.begin_drain()
        if self.slot is not None:
            self.slot.report_state("draining")
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        try:
            await self.service.drain()
            if running := set(self.server_state.tasks):
                await asyncio.wait(running, timeout=self.service.drain_time_left)
        finally:
            self.connections.end_drain()
            self.should_exit = True


def end_within(seconds: float) -> None:
    """From now on the process ends by then, with status 1 unless it has ended before, whatever hangs: the event loop, a
    thread that keeps Python's lock, or the interpreter's own end."""
    # The tracebacks go nowhere: stderr may have no reader, and would keep the process waiting.
    faulthandler.dump_traceback_later(seconds, exit=True, file=_DEV_NULL)


def _announce(service: Service, listening: socket.socket, slot: WorkerSlot | None) -> None:
    """Prints where the page is, and a request that works (with a key of the reader's, where keys are set), once every
    worker is ready: by one of them, once."""
    while slot is not None and slot.blocking_state():
        if service.status != "ready":
            return
        time.sleep(0.01)
    if slot is not None and not slot.is_first_to_announce():
        return
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    catalogue, steps = service.bundle.catalogue, service.bundle.max_steps
    history = [catalogue.item_ids[row] for row in catalogue.popular(1, Rules())]
    body = json.dumps({"user_id": "me", "history": history, "k": 5}, ensure_ascii=False)
    key = " -H 'X-API-Key: YOUR-KEY'" if service.settings.api_keys else ""
    curl = f"curl -s '{address}/recommend?reasoning_steps={steps}' -H 'Content-Type: application/json'{key} -d "
    print(
        f"Ready: {address}/ (try it), {address}/docs (the API). A first request:\n{curl}{shlex.quote(body)}", flush=True
    )
