"""Which models a service has and which of them answers whom: what a row of changes adds up to, and nothing else.

Pure: every process that has read the same changes has the same deployment, and a user has the same arm in all of them.
`serving/online/models.py` makes it true in a process.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from serving.errors import Conflict, UnknownModel


@dataclass(frozen=True, slots=True)
class Arm:
    """A share of the users, in per cent, and what answers them. reasoning_steps: of requests that name none; None: the
    model's default."""

    version: str
    percent: float
    reasoning_steps: int | None = None


@dataclass(frozen=True, slots=True)
class Shadow:
    """A version that searches for so many per cent of the requests as well, and whose answers nobody gets."""

    version: str
    percent: float = 100.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """How requests are split. Users whom no arm takes are answered by the active model. name: of the experiment;
    another name deals the users out anew."""

    name: str = ""
    arms: tuple[Arm, ...] = ()
    shadow: Shadow | None = None

    @property
    def versions(self) -> set[str]:
        return {each.version for each in (*self.arms, self.shadow) if each is not None}

    def arm_of(self, user_id: str | None, secret: bytes = b"") -> Arm | None:
        """The user's arm, always the same under one name and secret; without a user id, any by its share."""
        if not self.arms:
            return None
        point = 100 * (random.random() if user_id is None else _share(user_id, self.name, secret))
        for arm in self.arms:
            point -= arm.percent
            if point < 0:
                return arm
        return None


def _share(user_id: str, name: str, secret: bytes) -> float:
    """A number in [0, 1) that follows from the user and the name, and looks random without the secret."""
    key = f"{len(name)} {name} {user_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(key, digest_size=6, key=secret, person=b"arm of a user").digest()) / 2**48


@dataclass(frozen=True, slots=True)
class Deployment:
    """base: the version that the settings name, which every start loads. paths: version -> folder of those loaded
    beside it. active: the version that answers."""

    base: str
    active: str
    paths: dict[str, str] = field(default_factory=dict)
    traffic: Traffic = Traffic()

    @property
    def versions(self) -> list[str]:
        """Of all models, in the order in which they came."""
        return [self.base, *self.paths]

    def added(self, version: str, path: str) -> Deployment:
        return self if version in self.versions else replace(self, paths={**self.paths, version: path})

    def activated(self, version: str) -> Deployment:
        """Raises UnknownModel."""
        self._check(version)
        return replace(self, active=version)

    def retired(self, version: str) -> Deployment:
        """Raises UnknownModel; Conflict where the version is needed."""
        self._check(version)
        if version == self.active:
            raise Conflict("This model answers requests; activate another one first.")
        if version == self.base:
            raise Conflict("This is the model that the settings name, which every start loads; it cannot be retired.")
        if version in self.traffic.versions:
            raise Conflict("Traffic is sent to this model; change the traffic first.")
        return replace(self, paths={known: path for known, path in self.paths.items() if known != version})

    def directed(self, traffic: Traffic) -> Deployment:
        """Raises UnknownModel."""
        for version in sorted(traffic.versions):
            self._check(version)
        return replace(self, traffic=traffic)

    def _check(self, version: str) -> None:
        if version not in self.versions:
            raise UnknownModel("No model of this version is loaded; GET /models lists those that are.")
