"""Every error that serving raises on purpose. Each message says in one sentence what to do.

ServingError
├── BundleError          the bundle is missing, damaged, newer than this program, or does not fit together
├── RequestError         a request that cannot be answered as it is; `field` names the field at fault
│   ├── UnknownCatalogue a named subset that does not exist
│   └── FilterError      a filter that cannot be read; `position` of the first character at fault
├── Conflict             a change that does not fit what is deployed
├── UnknownModel         no model of this version is loaded
├── NoSemanticId         a new item cannot get a semantic ID
├── Overloaded           no room in the queue; `retry_after` seconds
├── DeadlineExceeded     the time budget cannot be met
├── NotReady             the model is still being loaded or warmed up
├── Draining             the service is shutting down
├── EngineDead           the engine's thread has stopped
├── EngineError          the runtime or the device cannot do what is required
├── ScoreError           offline scoring: histories, options or an earlier run's parts do not fit
├── StoreError           the Redis or the log of changes that is configured cannot be used
├── StoreUnavailable     a store of histories or changes did not confirm; the change may still take effect
├── StorageError         a file cannot be written
└── FolderInUse          another run uses the folder
"""

from __future__ import annotations


class ServingError(Exception):
    """Base of all errors that serving raises on purpose."""


class BundleError(ServingError):
    """The bundle is missing, damaged, newer than this program, or does not fit together."""


class RequestError(ServingError):
    """A request that cannot be answered as it is. `field` names the field at fault."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class UnknownCatalogue(RequestError):
    """A request names a subset of items that does not exist."""


class FilterError(RequestError):
    """A filter that cannot be read. position: of the character at which it is wrong, the first being 1."""

    def __init__(self, fault: str, position: int, field: str = "filter") -> None:
        super().__init__(f"At character {position} of the filter: {fault}.", field)
        self.fault, self.position = fault, position


class Conflict(ServingError):
    """A change that does not fit what is deployed, such as to retire the model that answers."""


class UnknownModel(ServingError):
    """No model of this version is loaded."""


class NoSemanticId(ServingError):
    """A new item cannot get a semantic ID: the bundle makes none from text, or all near ones are taken."""


class Overloaded(ServingError):
    """No room in the queue. `retry_after`: seconds after which trying again makes sense."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(ServingError):
    """The request's time budget cannot be met, or has passed."""


class NotReady(ServingError):
    """The model is still being loaded or warmed up."""


class Draining(ServingError):
    """The service is shutting down and takes no new work."""


class EngineDead(ServingError):
    """The engine's thread has stopped; the process must be restarted."""


class EngineError(ServingError):
    """The runtime or the device cannot do what is required."""


class StoreError(ServingError):
    """The Redis or the log of changes that is configured cannot be used by this service."""


class StoreUnavailable(ServingError):
    """A store of histories or changes did not confirm in time, or refused. The change may still take effect."""


class ScoreError(ServingError):
    """Offline scoring: histories, options or an earlier run's parts do not fit."""


class StorageError(ServingError):
    """A file cannot be written."""


class FolderInUse(ServingError):
    """Another run uses the folder."""
