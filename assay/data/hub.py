"""Datasets of the Hugging Face hub by name: streamed, never fetched whole, and kept as lines of JSON."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from assay.data.documents import Documents, default_cache, plain
from assay.data.jsonl import json_lines
from assay.spec.base import Spec

READERS = ("parquet", "json", "csv", "text", "arrow")


class HubSpec(Spec):
    """Which part of a dataset. config: null is its only or default one. revision: a branch, a tag or a commit; only a
    commit says what is read for ever."""

    config: str | None = None
    split: str = "train"
    revision: str | None = None


def fetched(name: str, hub: HubSpec, field: str, documents: int, errors: str) -> Documents:
    """The first rows of a dataset, from the cache where they are kept, else streamed into it.

    ValueError for a dataset, configuration or split that is not there, one whose files are of another kind than rows
    of text, and a row without text. The dataset's own code is never run.
    """
    key = hashlib.sha256(repr((name, hub, field, documents, errors)).encode()).hexdigest()[:32]
    path = default_cache() / f"hub-{key}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            part = path.with_suffix(".part")
            with part.open("w", encoding="utf-8") as file:
                for text in _texts(name, hub, field, documents, errors):
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            os.replace(part, path)
    return json_lines([(name, path)], "text", "strict")


def _texts(name: str, hub: HubSpec, field: str, documents: int, errors: str) -> Iterator[str]:
    for i, row in enumerate(islice(_rows(name, hub), documents)):
        where = f"{name}, row {i} of {hub.split}"
        if field not in row:
            raise ValueError(f"{where}: no field {field!r}; it has {', '.join(map(repr, row))}")
        if not isinstance(row[field], str):
            raise ValueError(f"{where}: field {field!r} is a {type(row[field]).__name__}, not a string")
        yield plain(row[field], errors, f"{where}: field {field!r}")


def _rows(name: str, hub: HubSpec) -> Iterator[dict[str, Any]]:
    if not Path(name).is_dir() and name.count("/") != 1:
        raise ValueError(f"corpus path {name!r}: accepted: the owner/name of a dataset, or a folder")
    import datasets

    try:
        builder = datasets.load_dataset_builder(name, hub.config, revision=hub.revision)
        reader = type(builder).__module__.rpartition(".")[2]
        splits = list(builder.info.splits or ()) or datasets.get_dataset_split_names(name, builder.config.name)
        if reader in READERS and hub.split in splits:
            yield from datasets.load_dataset(name, hub.config, split=hub.split, revision=hub.revision, streaming=True)
            return
    except (ValueError, OSError, datasets.exceptions.DatasetsError, RuntimeError) as error:
        raise ValueError(f"dataset {name}: {' '.join(str(error).split())[:300] or type(error).__name__}") from None
    if reader not in READERS:
        raise ValueError(f"dataset {name}: its files are read as {reader}; accepted: {', '.join(READERS)}")
    raise ValueError(f"hub.split: {hub.split!r}; dataset {name} has {', '.join(splits)}")
