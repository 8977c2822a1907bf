"""How an engine's cache is stored: in fewer bits, and with tiers behind its pages."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from assay.cache.backing import Backing
from assay.cache.formats import Formats
from assay.cache.size import Fields
from assay.cache.tiers import DiskTier, Tiers

KV_DTYPES = ("bf16", "int8", "int4")


@dataclass(frozen=True)
class Storage:
    """formats: of token fields, by globs of their names; None: all in the model's dtype. backing: where pages are
    looked for that memory does not have."""

    formats: Formats | None = None
    backing: Backing | None = None


def kv_formats(dtype: str, fields: Fields) -> Formats:
    """Token fields in `bf16`, or in `int8` or `int4`: keys by channel, all others with heads by token (KIVI, Liu et al.
    2024, arXiv 2402.02750), latents by channel, and the newest tokens in the model's dtype. States of recurrent layers
    and memories stay as they are. ValueError where there is nothing that it could change, and for another dtype."""
    if dtype not in KV_DTYPES:
        raise ValueError(f"kv dtype: {dtype!r}; accepted: {', '.join(KV_DTYPES)}")
    token = [(f"{part}.{f.name}", f) for part, own in fields.items() for f in own if f.per == "token"]
    if not token:
        raise ValueError(f"kv dtype: {dtype!r}: no layer of this model stores keys and values; accepted: none")
    rules: Mapping[str, str] = {
        name: dtype
        if dtype == "bf16"
        else f"{dtype}/{'token' if len(f.shape) > 1 and not name.endswith('.k') else 'channel'}"
        for name, f in token
    }
    return Formats(rules)


def weights_digest(folder: Path) -> str:
    """Of a checkpoint's spec and weights: pages that another model stored are never taken."""
    found = hashlib.sha256()
    for name in ("model.yaml", "model.safetensors"):
        with open(folder / name, "rb") as file:
            while piece := file.read(1 << 22):
                found.update(piece)
    return found.hexdigest()


def on_disk(checkpoint: Path, folder: Path, limit: int, dtype: str | None = None) -> Backing:
    """Pages of this checkpoint's model in a folder of at most `limit` bytes, which processes may share. dtype: of the
    weights, where they are not as the checkpoint has them: rounded ones make other keys and values."""
    told = weights_digest(checkpoint)
    return Backing(Tiers([DiskTier(folder, limit)]), told if dtype is None else f"{told}/{dtype}")
