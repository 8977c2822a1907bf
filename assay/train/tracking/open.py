"""Trackers by name, opened for a run."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path

from assay.spec.load import digest, dump
from assay.spec.model import ModelSpec
from assay.train.folder import flat
from assay.train.recipe import Recipe
from assay.train.tracking.base import About, Kind, Tracker, public


def opened(kinds: Sequence[Kind], folder: Path, spec: ModelSpec, recipe: Recipe, step: int) -> list[Tracker]:
    """A tracker for each kind. ModuleNotFoundError names the package of one that is not installed (extra `track`)."""
    if not kinds:
        return []
    fields = {**flat(dump(spec), "model"), **flat(dump(recipe.computed), "recipe")}
    key = f"{folder.resolve()} {digest(spec)} {recipe.digest} {recipe.seed}"
    name = f"{folder.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    about = About(folder, name, step, {path: public(value) for path, value in fields.items()})
    found: list[Tracker] = []
    try:
        for kind in kinds:
            found.append(importlib.import_module(f"assay.train.tracking.{kind}").opened(about))
    except BaseException:
        for tracker in found:
            tracker.close()
        raise
    return found
