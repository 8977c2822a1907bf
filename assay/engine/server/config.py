"""What the server accepts and how much of it, as frozen values."""

from __future__ import annotations

import ipaddress
import os
import stat
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from assay.spec.base import Spec


class Limits(Spec):
    """Bounds on what one client, or all of them together, can ask for.

    body_bytes: of a request's body. body_s: seconds until it must have arrived. prompt_tokens: null is the model's
    context. stops, choices: stop texts and `n`; stop_chars: characters of a stop text. prompts: of one completions
    call. told: log-probabilities that one call may ask for. schema_bytes: a JSON schema, pattern or set of tools.
    waiting: sequences that wait while `max_running` others run; more are told 429. drain_s: seconds that running
    replies have to finish after SIGTERM. head_s: seconds from a connection, or from the first byte of a later request,
    until the headers must have arrived.
    """

    body_bytes: int = Field(default=4 << 20, ge=1)
    body_s: float = Field(default=30.0, gt=0.0)
    prompt_tokens: int | None = Field(default=None, ge=1)
    stops: int = Field(default=16, ge=0)
    stop_chars: int = Field(default=1024, ge=1)
    choices: int = Field(default=16, ge=1)
    prompts: int = Field(default=64, ge=1)
    told: int = Field(default=1 << 20, ge=1)
    schema_bytes: int = Field(default=64 << 10, ge=1)
    waiting: int = Field(default=256, ge=0)
    drain_s: float = Field(default=8.0, ge=0.0)
    head_s: float = Field(default=30.0, gt=0.0)


class ServerConfig(Spec):
    """Where the server listens (port 0: any that is free), under which name the model stands, and for whom.

    keys: null answers everybody who reaches the port, so it is accepted on a loopback address alone. watchers: the keys
    that read /metrics and nothing else, and who alone may; null: the holder of the only key, and nobody where there are
    several, since the metrics tell what all of them do.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    keys: frozenset[str] | None = None
    watchers: frozenset[str] | None = None
    limits: Limits = Limits()

    @property
    def shared(self) -> bool:
        """Whether several have a key, so that none may see what the others do."""
        return len(self.keys or ()) > 1

    @model_validator(mode="after")
    def _watchers_are_others(self) -> Self:
        if self.watchers is not None and (self.keys is None or self.watchers & self.keys):
            raise ValueError(
                "watchers: keys for /metrics (--metrics-key-file); accepted: beside --api-key-file, and other keys"
            )
        return self

    @model_validator(mode="after")
    def _others_bring_keys(self) -> Self:
        if self.keys is None and not is_loopback(self.host):
            raise ValueError(
                f"host: {self.host!r} can be reached from other machines, so keys are needed (--api-key-file); "
                "accepted without: 127.0.0.1, ::1, localhost"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether nothing outside this machine reaches a socket bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(path: Path) -> frozenset[str]:
    """The keys of a file, one a line; empty lines and those that begin with # are left out.

    ValueError for a file that others may read or that holds no key, or a key that no header could carry.
    """
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise ValueError(
                f"{path}: mode {mode:03o} lets others at the keys; accepted: 600 or 400 (chmod 600 {path})"
            )
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{path}: no key in it; accepted: one key a line")
    for number, key in enumerate(keys, 1):
        if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"{path}: key {number}: accepted: 16 or more printable ASCII characters without spaces")
    return frozenset(keys)
