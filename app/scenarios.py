"""Scenarios: named presets of requests, kept by operators in the log of changes, and so the same in every process."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from app.errors import UnknownScenario
from app.schemas.recommend import RecommendRequest
from app.schemas.scenarios import Scenario
from serving.errors import RequestError
from serving.online.changelog import Entry
from serving.steps import Steps

log = logging.getLogger("streamrec.scenarios")

KIND = "scenario"  # of the log's entries
MOST = 1000  # scenarios


class Scenarios:
    """by_name: as this process has them."""

    def __init__(self) -> None:
        self.by_name: dict[str, Scenario] = {}

    def get(self, name: str) -> Scenario:
        """Raises UnknownScenario."""
        if name not in self.by_name:
            raise UnknownScenario("There is no scenario of this name; GET /scenarios lists them.", "scenario")
        return self.by_name[name]

    def complete(self, body: RecommendRequest, steps: Steps) -> tuple[RecommendRequest, Steps]:
        """A request and its steps with what its scenario presets, as far as it leaves that out.

        Raises UnknownScenario, and RequestValidationError where the two together are no request."""
        preset = self.get(body.scenario or "")
        said = {name: getattr(body, name) for name in body.model_fields_set}
        presets = preset.model_dump(exclude_unset=True, exclude={"reasoning_steps"})
        try:
            completed = RecommendRequest.model_validate(presets | said)
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error
        return completed, preset.reasoning_steps if steps is None else steps

    async def apply(self, entries: Sequence[Entry]) -> list[RequestError | None]:
        """Applies entries of the log: None for each that could be, and why another could not."""
        return [self._apply(entry) for entry in entries]

    def _apply(self, entry: Entry) -> RequestError | None:
        if not entry.keys() >= {"name", "preset"}:
            log.error("a change of a scenario has no name or no preset; a newer version made it")
            return RequestError("This process cannot read the scenario; its log says why.", "body")
        name, preset = entry["name"], entry["preset"]
        if preset is None:
            self.by_name.pop(name, None)
            return None
        if name not in self.by_name and len(self.by_name) >= MOST:
            return RequestError(f"There are {MOST} scenarios, the most permitted; delete one first.", "name")
        try:
            self.by_name[name] = Scenario.model_validate(preset)
        except ValidationError as error:
            log.error("a scenario cannot be used here, a newer version made it: %s", error.errors()[0]["msg"])
            return RequestError("This process cannot read the scenario; its log says why.", "body")
        return None
