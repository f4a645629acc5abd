"""The service's settings. Each is a command-line option and a STREAMREC_ variable; its default is stated here only."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import limits
from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from redis.asyncio.connection import parse_url

from serving.types import REDIS_PREFIX, RuntimeName, StateDtype

PREFIX = "STREAMREC_"
# The largest value of a setting by how its name ends: 100 years, and what a float, Lua or JSON still holds exactly.
MOST = {"s": 36_500 * 86_400, "ms": 36_500 * 86_400_000, "days": 36_500}
MOST_OF_OTHERS = 1 << 53

Listed = Annotated[tuple[str, ...], NoDecode]  # separated by commas


class Settings(BaseSettings):
    """Arguments take precedence over the environment, and the environment over the defaults."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    bundle: Path = Field(default=Path("bundles/demo"), description="folder of the bundle to serve")
    models_dir: Path | None = Field(
        default=None,
        description="folder of bundles that POST /models may load while the service runs; unset: none may be",
    )
    max_models: int = Field(
        default=3, ge=1, description="most models loaded at a time, including the one loaded at the start"
    )
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    runtime: RuntimeName = Field(
        default="onnx",
        description="what runs the network: onnx; onnx-int8, if the bundle passed its check; eager; or cuda, on a GPU",
    )
    workers: int = Field(
        default=1,
        ge=1,
        le=256,
        description="number of worker processes; without Redis, several keep no user data",
    )
    replicas: int = Field(
        default=1, ge=1, description="number of services behind one address; without Redis, several keep no user data"
    )
    threads: int = Field(default=1, ge=1, description="threads for the engine's computations")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="lowest level that is logged"
    )

    max_beam_width: int = Field(default=200, ge=1, description="widest beam a request may ask for")
    default_beam_width: int = Field(default=50, ge=1, description="beam width of requests that set none")
    default_timeout_ms: int = Field(default=10_000, ge=1, description="time budget of requests that set none")
    max_batch: int = Field(default=16, ge=1, description="most searches in one batch")
    max_batch_rows: int = Field(default=1600, ge=1, description="most beam rows in one batch")
    max_queue_ms: float = Field(
        default=1000, gt=0, description="longest queue, as the estimated time to work through it; beyond it: 503"
    )
    max_batch_users: int = Field(default=128, ge=1, description="most requests in one call of /recommend/batch")
    max_body_bytes: int = Field(default=1 << 20, ge=1, description="largest request body; beyond it: 413")
    hung_after_s: float = Field(
        default=30.0,
        gt=0,
        description="seconds a batch may take before the engine counts as hung, or 50 times the estimate, if longer",
    )
    start_timeout_s: float = Field(
        default=600.0, gt=0, description="seconds that loading and warm-up may take before the engine counts as hung"
    )
    drain_timeout_s: float = Field(
        default=20.0, ge=0, description="seconds after SIGTERM before requests still running are abandoned"
    )
    max_connections: int = Field(
        default=4000, ge=1, description="most connections per worker; beyond it the one idle longest is closed"
    )
    max_head_bytes: int = Field(
        default=32 << 10, ge=1024, description="largest head of a request, its URL included; beyond it: 431"
    )
    max_head_fields: int = Field(default=100, ge=10, description="most header fields of a request; beyond it: 431")
    head_timeout_s: float = Field(default=10.0, gt=0, description="longest wait for the head of a request; then 408")
    body_timeout_s: float = Field(default=30.0, gt=0, description="longest wait for the body of a request; then 408")
    max_unfinished_bytes: int = Field(
        default=64 << 20,
        ge=0,
        description="most bytes of unfinished request bodies; beyond it the oldest large one gets 503",
    )

    memory_cache_users: int = Field(
        default=10_000, ge=0, description="users whose encoded history is cached in process; 0: none"
    )
    memory_cache_bytes: int = Field(
        default=256 << 20, ge=0, description="most bytes of encoded histories cached in process"
    )
    cache_ttl_s: int = Field(
        default=3600, ge=1, description="seconds an encoded history stays cached, in process and in Redis"
    )
    state_dtype: StateDtype = Field(
        default="float32",
        description="number format of encoded histories; float16 halves the caches and changes scores by about 0.001",
    )
    redis_url: SecretStr | None = Field(
        default=None, description="Redis for known and encoded histories; unset: both are kept in process"
    )
    redis_prefix: str = Field(
        default=REDIS_PREFIX,
        pattern=r"^[A-Za-z0-9._:-]{1,64}$",
        description="what every key and channel in Redis begins with; deployments that share a Redis need "
        "different ones",
    )
    redis_timeout_ms: float = Field(
        default=5.0, gt=0, description="longest a request waits for an encoded history from Redis"
    )
    redis_store_timeout_ms: float = Field(
        default=100.0, gt=0, description="longest a request waits for a known history from Redis"
    )
    redis_max_value_bytes: int = Field(default=1 << 20, ge=1, description="largest encoded history written to Redis")
    max_known_users: int = Field(
        default=100_000, ge=1, description="most users whose history is kept in process, without Redis"
    )
    max_known_bytes: int = Field(
        default=256 << 20, ge=1, description="most bytes of histories kept in process, without Redis"
    )
    max_known_items: int = Field(default=1000, ge=1, description="how many of a user's newest items are kept")
    max_known_user_bytes: int = Field(
        default=64 << 10, ge=4096, description="most bytes of item ids kept per user; the oldest items are dropped"
    )
    known_ttl_s: int = Field(
        default=90 * 86_400, ge=1, description="seconds a history is kept after the user's last event"
    )
    rotation_window_s: int = Field(
        default=0,
        ge=0,
        description="seconds to remember which items a user was shown but did not take (from POST /feedback), for "
        "`rotation`; 0: off",
    )
    cold_list: Literal["bundle", "popular", "trending"] = Field(
        default="bundle",
        description="list for users without a history: the bundle's popular items, or the live popular or trending "
        "list, filled up from the bundle",
    )
    user_hash_key: SecretStr = Field(
        default=SecretStr(""),
        description="secret that hashes user ids in cache and Redis keys, and signs encoded histories in Redis",
    )

    state_dir: Path | None = Field(
        default=None,
        description="folder for the log of changes and for feedback, on one machine; unset: Redis keeps them, and "
        "without Redis a restart loses the changes and feedback is only counted",
    )
    feedback_window_s: int = Field(
        default=86_400, ge=1, description="seconds after a recommendation during which feedback on it is accepted"
    )
    feedback_retention_days: int = Field(default=90, ge=1, description="days feedback is kept")
    max_feedback_records: int = Field(
        default=1_000_000, ge=1, description="most feedback records kept in Redis; the oldest are dropped"
    )

    api_keys: Listed = Field(
        default=(), description="sha256 (hex) of the keys that may call, separated by commas; none: anyone may call"
    )
    admin_keys: Listed = Field(
        default=(),
        description="sha256 (hex) of admin keys, valid wherever an API key is, and the only ones that may change what "
        "is served; none: nobody may",
    )
    quota: str = Field(
        default="",
        description="limit per API key, or per address (IPv6: per /64) without keys, like 100/second;5000/minute; "
        "unset: none",
    )
    work_quota: str = Field(
        default="",
        description="limit on the work of the same clients, in beam rows times (reasoning steps + 1), like "
        "500000/minute; unset: none",
    )
    trusted_proxies: Listed = Field(
        default=(),
        description="addresses or networks of the proxies in front, separated by commas; the client is the last "
        "X-Forwarded-For address not in this list; none: the header is ignored",
    )
    allowed_hosts: Listed = Field(
        default=(),
        description="host names the service answers to, separated by commas, or *; IP addresses always work; unset: "
        "names without a dot if it listens on a loopback address without keys, else any",
    )
    cors_origins: Listed = Field(
        default=(),
        description="origins whose pages may call the service, separated by commas, or *; none: only its own pages",
    )
    otlp_endpoint: str | None = Field(
        default=None,
        description="where to send traces, like http://collector:4318 (needs the extra otel); unset: nowhere",
    )

    @field_validator("port", mode="before")
    @classmethod
    def _not_a_service_link(cls, value: object) -> object:
        # Kubernetes sets STREAMREC_PORT=tcp://… in every pod of a namespace with a Service named streamrec.
        return cls.model_fields["port"].default if isinstance(value, str) and value.startswith("tcp://") else value

    @field_validator("*")
    @classmethod
    def _not_too_large(cls, value: object, info: ValidationInfo) -> object:
        most = MOST.get((info.field_name or "").rpartition("_")[2], MOST_OF_OTHERS)
        if isinstance(value, int | float) and not value <= most:
            raise ValueError(f"give at most {most}")
        return value

    @field_validator("api_keys", "admin_keys", "trusted_proxies", "allowed_hosts", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip().lower() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("api_keys", "admin_keys")
    @classmethod
    def _hashes(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        if any(len(key) != 64 or set(key) - set("0123456789abcdef") for key in keys):
            raise ValueError("give the sha256 of each key, 64 hexadecimal digits, not the key itself")
        return keys

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        try:
            for proxy in proxies:
                ipaddress.ip_network(proxy)
        except ValueError:
            raise ValueError("give addresses or networks, like 10.0.0.7, 10.0.0.0/8 or fd00::/8") from None
        return proxies

    @field_validator("allowed_hosts")
    @classmethod
    def _host_names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        if any(host != "*" and not re.fullmatch(r"[a-z0-9._-]+", host) for host in hosts):
            raise ValueError("give names without scheme and port, like shop.example, or *")
        return hosts

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        if any(origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin) for origin in origins):
            raise ValueError("give origins as a browser sends them, like https://shop.example, or *")
        return origins

    @field_validator("quota", "work_quota")
    @classmethod
    def _parses(cls, quota: str) -> str:
        try:
            parsed = limits.parse_many(quota) if quota else []
        except ValueError:
            parsed = [limits.RateLimitItemPerSecond(0)]
        if any(limit.amount < 1 for limit in parsed):
            raise ValueError("give a quota like 100/second, or several like 100/second;5000/minute")
        return quota

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and not _names_a_redis(url.get_secret_value()):
            raise ValueError(  # nothing of the address: what cannot be read may be a part of its password
                "give an address like redis://:PASSWORD@host:6379/0, rediss://… over TLS, or unix:///path?db=0; "
                "in the password write %40 for @, %2F for /, %3A for :, %3F for ? and %23 for #"
            )
        return url

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
            raise ValueError("give at most 64 bytes")
        return value

    @model_validator(mode="after")
    def _beams(self) -> Settings:
        if self.default_beam_width > self.max_beam_width:
            raise ValueError("default_beam_width must not exceed max_beam_width")
        return self

    @cached_property
    def user_secret(self) -> bytes:
        return self.user_hash_key.get_secret_value().encode()


def _names_a_redis(url: str) -> bool:
    """Whether redis-py reads the address as it is meant. It drops what it does not understand, and would connect to
    another host where a password holds a slash."""
    try:
        parse_url(url)
        parts = urlsplit(url)
    except ValueError:
        return False
    if parts.scheme == "unix":
        return bool(parts.path) and not parts.fragment
    return bool(parts.hostname and re.fullmatch(r"/?\d*", parts.path)) and not parts.fragment


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def unknown_variables(environment: Iterable[str] = os.environ) -> list[str]:
    """STREAMREC_ variables that are not settings: most likely misspelt."""
    known = {variable(name) for name in Settings.model_fields}
    links = ("_SERVICE_HOST", "_SERVICE_PORT", "_TCP", "_ADDR", "_PROTO")
    return sorted(
        name for name in environment
        if name.startswith(PREFIX) and name not in known and not any(link in name for link in links)
    )  # fmt: skip
