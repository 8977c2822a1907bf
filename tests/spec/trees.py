"""A small model as YAML, and what loading a changed one says."""

from __future__ import annotations

from pathlib import Path

import pytest

from assay.spec.load import load_model

MODEL = """\
d_model: 32
vocab: 11
layers: 2
context: 16
blocks:
  b:
    mixer: {kind: gqa, heads: 4, position: p}
    ffn: {kind: gated, width: 24}
positions: {p: {kind: rope}}
"""


def refusal(folder: Path, text: str | bytes) -> str:
    """The one message that loading this file gives, without the file's path."""
    path = folder / "m.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: "), message
    assert "\n" not in message
    assert "pydantic" not in message and "Traceback" not in message
    return message.removeprefix(f"{path}: ")


def changed(old: str, new: str) -> str:
    assert MODEL.count(old) == 1, old
    return MODEL.replace(old, new)
