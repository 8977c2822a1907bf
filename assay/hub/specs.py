"""A model's spec from whatever describes one: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from assay.spec.load import change, load_model, shelf
from assay.spec.model import ModelSpec

CONFIG = "config.json"


def spec_of(source: str | Path, changes: Mapping[str, Any] | None = None) -> tuple[ModelSpec, tuple[str, ...]]:
    """The spec of a shipped name, a YAML file, a checkpoint folder, or a Hugging Face config.json or folder, with
    dotted changes; and the keys of its config.json that nothing reads. ValueError names the field and what is accepted.
    """
    if source in shelf("models") or not is_hugging_face(Path(source)):
        return load_model(source, changes), ()

    from assay.data.settings import read_object
    from assay.hub.family import read  # families import torch, which nothing above needs

    path = Path(source)
    config = path / CONFIG if path.is_dir() else path
    found = read(read_object(config), str(config), tensor_names(path) if path.is_dir() else None)
    return change(found.spec, changes, str(source)) if changes else found.spec, found.unread


def is_hugging_face(path: Path) -> bool:
    """A config.json, or a folder with one that is not a checkpoint."""
    if path.is_dir():
        return (path / CONFIG).is_file() and not (path / "model.yaml").is_file()
    return path.suffix == ".json" and path.is_file()


def tensor_names(folder: Path) -> frozenset[str] | None:
    """Of the folder's safetensors, whose headers alone are read; null where it has none."""
    from assay.hub.files import INDEX, SINGLE, open_folder

    if not any((folder / name).is_file() for name in (INDEX, SINGLE)):
        return None
    with open_folder(folder) as tensors:
        return tensors.names
