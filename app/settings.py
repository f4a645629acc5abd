"""Every setting of the service, its default and its meaning, once. Each is an option and a STREAMREC_ variable."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import limits
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from serving.types import RuntimeName, StateDtype

PREFIX = "STREAMREC_"

Listed = Annotated[tuple[str, ...], NoDecode]  # separated by commas


class Settings(BaseSettings):
    """Read from arguments, then from the environment, then the defaults below."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    bundle: Path = Field(default=Path("bundles/demo"), description="folder of the bundle to serve")
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    runtime: RuntimeName = Field(
        default="onnx",
        description="what runs the network: onnx, onnx-int8 for bundles that passed its gate, eager, or cuda on a GPU",
    )
    workers: int = Field(
        default=1, ge=1, le=256, description="processes behind the port; without Redis, several keep nothing of users"
    )
    threads: int = Field(default=1, ge=1, description="threads of the engine's arithmetic")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="lowest level that is logged"
    )

    max_beam_width: int = Field(default=200, ge=1, description="widest beam a request may ask for")
    default_beam_width: int = Field(default=50, ge=1, description="beam width of requests that name none")
    default_timeout_ms: int = Field(default=10_000, ge=1, description="time budget of requests that name none")
    max_batch: int = Field(default=16, ge=1, description="searches that may share a batch")
    max_batch_rows: int = Field(default=1600, ge=1, description="beam rows that may share a batch")
    max_queue_ms: float = Field(
        default=1000, gt=0, description="bound of the queue, in measured time of the work that waits; beyond it: 503"
    )
    max_batch_users: int = Field(default=128, ge=1, description="requests in one call of /recommend/batch")
    max_body_bytes: int = Field(default=1 << 20, ge=1, description="largest request body; beyond it: 413")
    drain_timeout_s: float = Field(default=20.0, ge=0, description="longest wait for running requests at shutdown")

    memory_cache_users: int = Field(
        default=10_000, ge=0, description="users whose encoder state is kept in process; 0: none"
    )
    memory_cache_bytes: int = Field(default=256 << 20, ge=0, description="memory of those states")
    cache_ttl_s: int = Field(default=3600, ge=1, description="seconds a cached encoder state lives, in either tier")
    state_dtype: StateDtype = Field(
        default="float32",
        description="numbers of encoder states; float16 halves what caches hold and moves scores by about 0.001",
    )
    redis_url: SecretStr | None = Field(
        default=None, description="Redis for histories and encoder states; unset: in process"
    )
    redis_timeout_ms: float = Field(
        default=5.0, gt=0, description="longest a request waits for a cached state in Redis"
    )
    redis_store_timeout_ms: float = Field(
        default=100.0, gt=0, description="longest a request waits for a history in Redis"
    )
    redis_max_value_bytes: int = Field(default=1 << 20, ge=1, description="largest encoder state put into Redis")
    max_known_users: int = Field(
        default=100_000, ge=1, description="users whose history is kept in process, without Redis"
    )
    max_known_items: int = Field(default=1000, ge=1, description="newest items kept of a user's history")
    user_hash_key: SecretStr = Field(default=SecretStr(""), description="secret that user ids are hashed with in keys")

    api_keys: Listed = Field(
        default=(), description="sha256 (hex) of the keys that may call, separated by commas; none: everybody may"
    )
    admin_keys: Listed = Field(
        default=(), description="sha256 (hex) of the keys that may also change the service; none: nobody may"
    )
    quota: str = Field(
        default="",
        description="what one key, or without keys one address, may ask for, like 100/second;5000/minute; unset: all",
    )
    cors_origins: Listed = Field(
        default=(), description="origins whose pages may call, separated by commas, or *; none: only the service's own"
    )
    otlp_endpoint: str | None = Field(
        default=None, description="where traces go, like http://collector:4318 (extra otel); unset: nowhere"
    )

    @field_validator("port", mode="before")
    @classmethod
    def _not_a_service_link(cls, value: object) -> object:
        # Kubernetes sets STREAMREC_PORT=tcp://… in every pod beside a service named streamrec.
        return cls.model_fields["port"].default if isinstance(value, str) and value.startswith("tcp://") else value

    @field_validator("api_keys", "admin_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip().lower() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("api_keys", "admin_keys")
    @classmethod
    def _hashes(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        if any(len(key) != 64 or set(key) - set("0123456789abcdef") for key in keys):
            raise ValueError("give the sha256 of each key, 64 hexadecimal digits, not the key itself")
        return keys

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        if any(origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin) for origin in origins):
            raise ValueError("give origins as a browser sends them, like https://shop.example, or *")
        return origins

    @field_validator("quota")
    @classmethod
    def _parses(cls, quota: str) -> str:
        try:
            parsed = limits.parse_many(quota) if quota else []
        except ValueError:
            parsed = [limits.RateLimitItemPerSecond(0)]
        if any(limit.amount < 1 for limit in parsed):
            raise ValueError("give a quota like 100/second, or several like 100/second;5000/minute")
        return quota

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_http(cls, address: str | None) -> str | None:
        if address is not None and not address.startswith(("http://", "https://")):
            raise ValueError("give the collector's address for OTLP over HTTP, like http://collector:4318")
        return address

    @field_validator("user_hash_key")
    @classmethod
    def _fits_blake2(cls, value: SecretStr) -> SecretStr:
        if len(value.get_secret_value().encode()) > 64:
            raise ValueError("at most 64 bytes")
        return value

    @model_validator(mode="after")
    def _beams(self) -> Settings:
        if self.default_beam_width > self.max_beam_width:
            raise ValueError("default_beam_width must not exceed max_beam_width")
        return self

    @property
    def user_secret(self) -> bytes:
        return self.user_hash_key.get_secret_value().encode()


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def unknown_variables(environment: Iterable[str] = os.environ) -> list[str]:
    """STREAMREC_ variables that no setting reads: most likely misspelt."""
    known = {variable(name) for name in Settings.model_fields}
    links = ("_SERVICE_HOST", "_SERVICE_PORT", "_TCP", "_ADDR", "_PROTO")
    return sorted(
        name for name in environment
        if name.startswith(PREFIX) and name not in known and not any(link in name for link in links)
    )  # fmt: skip
