"""The tensors of a checkpoint, by name, without reading them all at once: safetensors, one file or sharded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from assay.data.settings import read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.pt")
FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


class Tensors(Protocol):
    """What an importer reads. `shape` and `names` cost nothing; `read` gives one tensor, as it is stored."""

    where: str

    @property
    def names(self) -> frozenset[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> Tensor: ...


class SafeTensors:
    """The safetensors files of one folder. Use `open_folder`."""

    def __init__(self, where: str, files: Mapping[Path, Any]) -> None:
        self.where = where
        self._slices: dict[str, Any] = {}
        for path, file in files.items():
            names: list[str] = file.keys()
            for name in names:
                if name in self._slices:
                    raise ValueError(f"{path}: {name}: stands in another file too")
                self._slices[name] = (path, file)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name][1].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        path, file = self._slices[name]
        kind = file.get_slice(name).get_dtype()
        if kind not in FLOATS:
            raise ValueError(f"{path}: {name}: dtype {kind}; accepted: {', '.join(sorted(FLOATS))}")
        try:
            tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path}: {name}: {error}") from None
        return tensor


@contextmanager
def open_folder(folder: Path) -> Iterator[SafeTensors]:
    """The tensors of a checkpoint folder. ValueError for a file that is missing, cut short or lies about its contents,
    for pickles, and for an index that points out of its folder."""
    paths = weight_files(folder)
    opened = {}
    for path in paths:
        try:
            # Pages come in as tensors are read, and go when they are: a file is never held whole.
            opened[path] = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: not a safetensors file, or one that was cut short: {error}") from None
    try:
        yield SafeTensors(str(folder), opened)
    finally:
        opened.clear()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a folder's index names, else its one file."""
    if (folder / INDEX).is_file():
        listed = read_object(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(v, str) for v in listed.values()):
            raise ValueError(f"{folder / INDEX}: weight_map: a mapping from tensors to files is expected")
        return [inside(folder, name) for name in sorted(set(listed.values()))]
    if (folder / SINGLE).is_file():
        return [inside(folder, SINGLE)]
    pickled = next((name for name in PICKLES if (folder / name).exists()), None)
    if pickled is not None:
        raise ValueError(
            f"{folder / pickled}: a pickle, which can run code when it is read; accepted: safetensors. "
            "transformers can rewrite it: AutoModel.from_pretrained(...).save_pretrained(...)"
        )
    raise FileNotFoundError(f"{folder}: no {SINGLE} and no {INDEX}")


def inside(folder: Path, name: str) -> Path:
    """A file of the folder by its plain name. A link counts only into the store of a hub cache: blobs beside
    snapshots."""
    if name != Path(name).name or name in ("", ".", "..") or "\\" in name:
        raise ValueError(f"{folder / INDEX}: {name!r:.80}: not a plain file name")
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: named by {INDEX}, and not there")
    real, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if real.parent != home and real.parent != blobs:
        raise ValueError(f"{path}: a link out of its folder; accepted: files of {folder}")
    return path


def as_float(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In the dtype that is wanted; null keeps bfloat16, float16 and float32, and makes anything else float32."""
    kept = (torch.float32, torch.bfloat16, torch.float16)
    return tensor.to(dtype if dtype is not None else tensor.dtype if tensor.dtype in kept else torch.float32)
