"""What reads files from elsewhere, given any bytes: it succeeds, or says what is wrong by a ValueError.

`test_fuzz.py` changes good files at random; `guided.py` lets atheris look for what reaches new lines.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from assay.data.settings import read_object
from assay.hub.family import families, read
from assay.hub.files import SINGLE, open_folder
from assay.hub.gguf import read_gguf
from assay.hub.gguf_config import source_of
from assay.hub.load import CONFIG, load, open_checkpoint, planned
from assay.hub.tokenizer import folder_tokenizer, gguf_tokenizer
from assay.spec.load import parse_yaml
from tests.fuzz.seeds import LLAMA

TEXT = "ab  a1 <s>\n\u00e9\U0001f600"


def gguf(path: Path) -> None:
    """Header, then whatever can be made of it: the plan of a model, its first tensors, the tokenizer."""
    file = read_gguf(path)
    with contextlib.suppress(ValueError):
        planned(source_of(file))
    for name in list(file.tensors)[:3]:
        file.read(name)
    gguf_tokenizer(file.metadata, file.where).encode(TEXT)


def safetensors(path: Path) -> None:
    """Every tensor, and the model that a configuration beside them says they are."""
    path.rename(path.with_name(SINGLE))
    (path.parent / CONFIG).write_text(json.dumps(LLAMA))
    with contextlib.suppress(ValueError), open_checkpoint(path.parent) as source:
        load(source)
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


def tokenizer(path: Path) -> None:
    """A text to ids and back, as a whole and token by token."""
    path.rename(path.with_name("tokenizer.json"))
    words = folder_tokenizer(path.parent)
    ids = words.framed(TEXT)
    words.decode(ids)
    stream = words.stream()
    for token in ids.tolist():
        stream.push(token)


def yaml(path: Path) -> None:
    parse_yaml(path.read_bytes().decode("utf-8", "replace"), "a.yaml")


TARGETS: dict[str, Callable[[Path], None]] = {
    "gguf": gguf,
    "safetensors": safetensors,
    "config": config,
    "tokenizer": tokenizer,
    "yaml": yaml,
}


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
