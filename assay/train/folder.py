"""A run's folder: one run at a time, never another run's, and metrics.jsonl."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from assay.data.tokenizers import Tokenizer, TokenizerSpec
from assay.spec.base import Spec
from assay.spec.load import digest, dump
from assay.spec.model import ModelSpec
from assay.train.checkpoint import MODEL, RECIPE, WEIGHTS, describe, load_spec, sync
from assay.train.recipe import Recipe, load_recipe
from assay.train.tracking.base import Tracker

METRICS, LOCK = "metrics.jsonl", ".lock"


class Metrics:
    """metrics.jsonl: a line for each step (`step, tokens, loss_nats, grad_norm, lr, tok_s`) and for each validation
    (`step, tokens, valid_nats, valid_bits_per_byte`, with an average of the weights `valid_ema_nats`). A line that a
    kill tore in two is dropped by the next writer."""

    def __init__(self, path: Path, size: int, also: Sequence[Tracker] = ()) -> None:
        """Go on after the first `size` bytes; what stands behind them belongs to steps that will be taken again. also:
        who is told every line too."""
        path.touch()
        if path.stat().st_size < size:
            raise ValueError(f"{path}: {path.stat().st_size} bytes; its run was saved when it had {size}")
        os.truncate(path, size)
        self.path, self.also = path, tuple(also)
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        for tracker in self.also:
            tracker.write(values)

    def size(self) -> int:
        """How many bytes there are, all of them on the disk."""
        self._file.flush()
        sync(self.path)
        return self.path.stat().st_size

    def close(self) -> None:
        self._file.close()
        for tracker in self.also:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a torn last line is left out. ValueError for any other line that is not JSON."""
    rows: list[dict[str, Any]] = []
    lines = path.read_text("utf-8").split("\n") if path.exists() else [""]
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is torn, or nothing
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            raise ValueError(f"{path}, line {number}: not JSON: {line[:60]!r}") from None
    return rows


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; ValueError when another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: in use by another run; wait for it, or choose another folder") from None
        yield


def holds_run(folder: Path) -> bool:
    return (folder / RECIPE).exists()


def own_words(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with its text in the ids of a checkpoint that holds no run: its embeddings know no others."""
    if holds_run(folder) or (recipe.tokenizer.kind == "byte" and Tokenizer.load(folder).is_bytes):
        return recipe
    return recipe.model_copy(update={"tokenizer": TokenizerSpec(kind="made", folder=str(folder))})


def claim(folder: Path, spec: ModelSpec, recipe: Recipe, tokenizer: Tokenizer, resume: bool) -> None:
    """Begin a run in this folder, or see that the one it holds is this one. ValueError says what it holds instead."""
    if not (folder / WEIGHTS).exists():  # nothing here, or a run that was stopped before its first save
        describe(folder, spec, tokenizer, recipe.computed)
        return
    if not (folder / MODEL).exists():
        raise ValueError(f"{folder}: holds {WEIGHTS} without a {MODEL}; choose another folder")
    if not (folder / RECIPE).exists():
        raise ValueError(f"{folder}: holds a model that was not trained here; choose another folder")
    same(folder, load_spec(folder), spec, "model")
    same(folder, load_recipe(folder).computed, recipe.computed, "recipe")
    if not resume:
        raise ValueError(f"{folder}: holds this run already; resume it (--resume), or choose another folder")


def same(folder: Path, held: Spec, wanted: Spec, what: str) -> None:
    """ValueError naming both digests and the first fields that differ, unless the two specs are the same."""
    if digest(held) == digest(wanted):
        return
    a, b = flat(dump(held), what), flat(dump(wanted), what)
    differ = [f"{k}: {a.get(k, 'nothing')} there, {b.get(k, 'nothing')} here" for k in a | b if a.get(k) != b.get(k)]
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    raise ValueError(
        f"{folder}: holds another run ({what} {digest(held)}, not {digest(wanted)}): {'; '.join(differ[:3])}{more}; "
        "choose another folder"
    )


def flat(tree: Any, path: str) -> dict[str, Any]:
    """Leaves of a tree by dotted path."""
    if isinstance(tree, Mapping) and tree:
        return {k: v for name, child in tree.items() for k, v in flat(child, f"{path}.{name}").items()}
    return {path: tree}
