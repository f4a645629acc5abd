"""The models that are loaded in this process, and the way of a query to the one that answers it.

A query is given its model once, before anything is looked up, and keeps it to the end: no answer mixes two versions,
whatever is activated meanwhile. A model that is retired stays in memory as long as a search of it runs, and no longer.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from serving.errors import BundleError, Conflict, ServingError
from serving.online.deployment import Arm, Deployment, Shadow, Traffic
from serving.online.listing import Recommendation
from serving.online.observer import Observer
from serving.online.query import Query
from serving.online.recommender import Recommender

log = logging.getLogger("streamrec.models")

MAX_SHADOWS = 8  # searches of the shadow at a time; beyond them it is not asked
SHADOW_CLIENT = "shadow"  # whose share of the engine's time they take

Change = Mapping[str, Any]


class Assigned(NamedTuple):
    """A query and the model that answers it, for its whole way."""

    recommender: Recommender
    query: Query


class Models:
    """base: the model that the settings name. open: loads the one in a folder, ready to answer. secret: keys the split
    of users. loaded: by version.

    All but the shadow's searches happens where it is called: on the event loop.
    """

    def __init__(
        self,
        base: Recommender,
        open: Callable[[str], Awaitable[Recommender]],
        secret: bytes = b"",
        observer: Observer | None = None,
    ) -> None:
        self._open, self._secret, self._observer = open, secret, observer or Observer()
        version = base.bundle.version
        self.deployment = Deployment(base=version, active=version)
        self.loaded = {version: base}
        self._staged: dict[str, asyncio.Task[Recommender]] = {}  # by version: opened here, and not loaded yet
        self._wanted: set[str] = set()  # versions of the changes that are being applied
        self._shadows: set[asyncio.Task[None]] = set()

    @property
    def active(self) -> Recommender:
        """What answers users whom no arm takes. A process that could not load the active version has its base."""
        return self.loaded.get(self.deployment.active, self.loaded[self.deployment.base])

    @property
    def in_memory(self) -> set[str]:
        """The versions that are loaded, and those whose change is still to be applied."""
        return {*self.loaded, *self._staged, *self._wanted}

    # The way of a query

    def assign(self, query: Query) -> Assigned:
        """Gives a query the model that answers it, and where it names no steps those of its user's arm."""
        arm = self.deployment.traffic.arm_of(query.user_id, self._secret)
        recommender = None if arm is None else self.loaded.get(arm.version)
        if arm is None or recommender is None:
            return Assigned(self.active, query)
        if query.steps is None and arm.reasoning_steps is not None:
            query = replace(query, steps=arm.reasoning_steps)
        return Assigned(recommender, query)

    async def recommend(self, assigned: Assigned) -> Recommendation:
        """Raises what `Recommender.recommend` raises."""
        found = await assigned.recommender.recommend(assigned.query)
        shadow = self.deployment.traffic.shadow
        is_search = found.source == "model" and not assigned.query.rank_only
        if shadow is not None and is_search and 100 * random.random() < shadow.percent:
            self._start_shadow(shadow.version, assigned, found)
        return found

    def _start_shadow(self, version: str, assigned: Assigned, found: Recommendation) -> None:
        shadow = self.loaded.get(version)
        if shadow is None or len(self._shadows) >= MAX_SHADOWS:
            self._observer.shadow_failed(version, "busy" if shadow else "not_loaded")
            return
        task = asyncio.create_task(self._ask_shadow(shadow.unobserved(), assigned, found))
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def _ask_shadow(self, shadow: Recommender, assigned: Assigned, found: Recommendation) -> None:
        version, query = shadow.bundle.version, replace(assigned.query, client=SHADOW_CLIENT, explain=False)
        try:
            other = await shadow.recommend(query)
        except ServingError as error:
            self._observer.shadow_failed(version, "overloaded" if hasattr(error, "retry_after") else "refused")
            return
        except Exception:
            log.exception("the shadow %s failed", version)
            self._observer.shadow_failed(version, "failed")
            return
        ours, theirs = assigned.recommender.item_ids(found), shadow.item_ids(other)
        self._observer.shadowed(version, len(set(ours) & set(theirs)) / max(1, len(ours)))

    async def close(self) -> None:
        """Gives up what the shadow still searches for, and models that are still being opened."""
        tasks = [*self._shadows, *self._staged.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Changes. An operator's process checks a change with the functions below before it is appended to the log of
    # changes; every process then applies the log's entries in the log's order.

    async def stage(self, version: str, path: str) -> Change:
        """Loads the model in a folder and keeps it until its change is applied. Raises BundleError."""
        await self._opened(version, path)
        return self._change(do="add", version=version, path=path)

    def unstage(self, version: str) -> None:
        """Drops a staged model whose change came to nothing; not one that the change of another process waits for."""
        if version not in self._wanted and (staged := self._staged.pop(version, None)):
            staged.cancel()

    async def _opened(self, version: str, path: str) -> Recommender:
        """A model that is opened once, also where this process and another one add it at the same time: a second one
        would be cut off from the changes of its catalogue."""
        if version not in self._staged:
            self._staged[version] = asyncio.create_task(self._open_version(version, path))
        return await asyncio.shield(self._staged[version])

    async def _open_version(self, version: str, path: str) -> Recommender:
        recommender = await self._open(path)
        if recommender.bundle.version != version:
            raise BundleError(f"The folder {path} holds another version than {version}; load it under its own.")
        return recommender

    def activation(self, version: str) -> Change:
        change = self._checked(self._change(do="activate", version=version))
        if version not in self.loaded:
            raise Conflict("This process could not load the model; its log says why. Load it again first.")
        return change

    def retirement(self, version: str) -> Change:
        return self._checked(self._change(do="retire", version=version))

    def direction(self, traffic: Traffic) -> Change:
        return self._checked(self._change(do="direct", **asdict(traffic)))

    def _change(self, **what: Any) -> Change:
        return {"base": self.deployment.base, **what}

    def _checked(self, change: Change) -> Change:
        changed(self.deployment, change)
        return change

    async def apply(self, changes: Sequence[Change]) -> list[ServingError | None]:
        """Makes changes true in this process: None for each that is, and why another is not. A model that cannot be
        loaded here is reported in the log of the process, and its requests are answered by the active one."""
        results: list[ServingError | None] = []
        deployment = self.deployment
        for change in changes:
            try:
                deployment = changed(deployment, change)
                results.append(None)
            except ServingError as error:
                results.append(error)
            except (KeyError, TypeError) as error:  # another takes no part of those before and after it
                log.error("a change of models cannot be read, a newer version made it: %r", error)
                results.append(Conflict("This process cannot read the change; its log says why."))
        self._wanted = set(deployment.versions)
        try:
            loaded = {version: await self._model(version, deployment) for version in deployment.versions}
        finally:
            self._wanted = set()
        self.loaded = {version: model for version, model in loaded.items() if model is not None}
        self.deployment = deployment
        for version in deployment.versions:
            self._staged.pop(version, None)
        return results

    async def _model(self, version: str, deployment: Deployment) -> Recommender | None:
        if version in self.loaded:
            return self.loaded[version]
        try:
            return await self._opened(version, deployment.paths[version])
        except Exception as error:
            log.error("the model %s could not be loaded, and other processes may have it: %s", version, error)
            return None


def changed(deployment: Deployment, change: Change) -> Deployment:
    """The deployment after a change. Raises UnknownModel or Conflict where the change does not fit it."""
    if change["base"] != deployment.base:
        raise Conflict(
            "The change was made for another bundle than the one that this service was started with; start all "
            "services that share a log with the same one."
        )
    match change["do"]:
        case "add":
            return deployment.added(change["version"], change["path"])
        case "activate":
            return deployment.activated(change["version"])
        case "retire":
            return deployment.retired(change["version"])
        case "direct":
            arms = tuple(Arm(**arm) for arm in change["arms"])
            shadow = change["shadow"] and Shadow(**change["shadow"])
            return deployment.directed(Traffic(change["name"], arms, shadow))
        case other:
            raise Conflict(
                f"A change of models of kind {str(other)[:64]!r} was made by a newer version; update this service."
            )
