"""One record of a tier: the tensors of a page (or of a snapshot) as a safetensors file that says whose it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

VERSION = "1"

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Scope:
    """What a record is good for: nothing is shared between models (by digest of spec and weights), page sizes or
    formats."""

    model: str
    page: int
    formats: str = ""

    def name(self, what: str, chain: bytes, key: bytes = b"") -> str:
        """64 hexadecimal digits. what: which tensors, of all those at this place. chain: the hash of the tokens up to
        the page's end. key: the tenant's; without it the name cannot be made."""
        digest = hashlib.sha256()
        for field in (VERSION, self.model, str(self.page), self.formats, what):
            _enter(digest, field.encode())
        _enter(digest, chain)
        _enter(digest, key)
        return digest.hexdigest()


def _enter(digest: hashlib._Hash, field: bytes) -> None:
    """With its length before it, so that no two lists of fields read the same."""
    digest.update(len(field).to_bytes(8, "little"))
    digest.update(field)


def content(name: str, tensors: Tensors) -> str:
    """The SHA-256 of a record: its name, and names, dtypes, shapes and bytes of its tensors."""
    digest = hashlib.sha256()
    _enter(digest, name.encode())
    for key, value in sorted(tensors.items()):
        _enter(digest, f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pack(name: str, tensors: Tensors) -> bytes:
    """Tensors on the host to the bytes of a safetensors file."""
    whole = {key: value.contiguous() for key, value in tensors.items()}
    return save(whole, {"assay": VERSION, "name": name, "sha256": content(name, whole)})


def unpack(blob: bytes, name: str, shapes: Shapes) -> dict[str, Tensor]:
    """The tensors of a record. ValueError where it is cut short, another's, of other shapes, or changed.

    The digest finds damage. It is no signature: who may write to a store may write a record with a fitting digest.
    """
    try:
        tensors = load(blob)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"no safetensors file: {error}") from None
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    about = header.get("__metadata__", {})
    if about.get("assay") != VERSION or about.get("name") != name:
        raise ValueError(f"it says it is {about.get('name')!r} of version {about.get('assay')!r}")
    found = {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()}
    if found != dict(shapes):
        raise ValueError(f"its tensors are {found}; expected {dict(shapes)}")
    if about.get("sha256") != content(name, tensors):
        raise ValueError("its content is not what was stored")
    return tensors
