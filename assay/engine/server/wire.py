"""Bytes on the wire: JSON, and server-sent events."""

from __future__ import annotations

import json
from typing import Any

DONE = b"data: [DONE]\n\n"
STRICT = json.JSONEncoder(allow_nan=False, separators=(",", ":"))  # `json.dumps` would make one for each token


def dumps(value: Any) -> bytes:
    """One line of strict JSON in ASCII, so that no text in it can end a line or fail to encode."""
    return STRICT.encode(value).encode()


def event(value: Any) -> bytes:
    return b"data: " + dumps(value) + b"\n\n"
