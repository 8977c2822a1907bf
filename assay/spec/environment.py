"""What the user's environment says, read once when the program starts: nothing that computes looks at it again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """native: whether kernels may be compiled and used (`ASSAY_NATIVE=0`: not). compiler: $CXX. cache: $ASSAY_CACHE,
    or assay/ in the user's cache folder ($XDG_CACHE_HOME, ~/.cache)."""

    native: bool
    compiler: str | None
    cache: Path

    @classmethod
    def read(cls) -> Environment:
        said, chosen = os.environ, os.environ.get("ASSAY_CACHE")
        cache = Path(chosen) if chosen else Path(said.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "assay"
        return cls(said.get("ASSAY_NATIVE", "1") != "0", said.get("CXX") or None, cache)


ENVIRONMENT = Environment.read()
