"""What reads files from elsewhere, given any bytes: it succeeds, or says what is wrong by a ValueError.

`test_fuzz.py` changes good files at random; `guided.py` lets atheris look for what reaches new lines.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from assay.data.settings import read_object
from assay.hub.family import families, read
from assay.hub.files import SINGLE, open_folder
from assay.hub.gguf import read_gguf
from assay.hub.gguf_config import source_of
from assay.hub.load import planned
from assay.hub.tokenizer import gguf_tokenizer
from assay.spec.load import parse_yaml


def gguf(path: Path) -> None:
    """Header, then whatever can be made of it: the plan of a model, its first tensors, the tokenizer."""
    file = read_gguf(path)
    with contextlib.suppress(ValueError):
        planned(source_of(file))
    for name in list(file.tensors)[:3]:
        file.read(name)
    gguf_tokenizer(file.metadata, file.where)


def safetensors(path: Path) -> None:
    path.rename(path.with_name(SINGLE))
    with open_folder(path.parent) as tensors:
        for name in tensors.names:
            tensors.shape(name)
            tensors.read(name)


def config(path: Path) -> None:
    """A configuration of every family that it can be taken for."""
    values = read_object(path)
    for kind in (values.get("model_type"), *families()):
        with contextlib.suppress(ValueError):
            read({**values, "model_type": kind})


def yaml(path: Path) -> None:
    parse_yaml(path.read_bytes().decode("utf-8", "replace"), "a.yaml")


TARGETS: dict[str, Callable[[Path], None]] = {"gguf": gguf, "safetensors": safetensors, "config": config, "yaml": yaml}


def holds(name: str, data: bytes) -> bool:
    """Whether the target reads these bytes. Anything it raises but a ValueError is a defect, and is passed on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        try:
            TARGETS[name](path)
        except ValueError:
            return False
        return True
