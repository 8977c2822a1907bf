"""A checkpoint of another library becomes a model: every tensor used once, every parameter filled, or an error."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from assay.data.settings import read_object
from assay.hub.family import Copy, copies, read
from assay.hub.files import Tensors, as_float, open_folder
from assay.model.lm import LM
from assay.spec.model import ModelSpec

CONFIG, MANY = "config.json", 100_000
Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Imported:
    """A model from elsewhere. unread: configuration keys nobody asked for. skipped: tensors that are not parameters,
    with the reason."""

    model: LM
    spec: ModelSpec
    family: ModuleType
    unread: tuple[str, ...]
    skipped: dict[str, str]


@dataclass(frozen=True)
class Source:
    """A configuration with its tensors, open for reading."""

    spec: ModelSpec
    family: ModuleType
    unread: tuple[str, ...]
    tensors: Tensors


@contextmanager
def open_checkpoint(folder: Path, config: Path | None = None) -> Iterator[Source]:
    """A Hugging Face folder. config: another file to read the configuration from."""
    path = config or folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    values = read_object(path)
    refuse_quantised(values, str(path))
    with open_folder(folder) as tensors:
        found = read(values, str(path), tensors.names)
        yield Source(found.spec, found.family, found.unread, tensors)


def refuse_quantised(values: Mapping[str, Any], where: str) -> None:
    """ValueError for weights that are stored in fewer bits: FP8 with scales, NVFP4, MXFP4, GPTQ, AWQ, bitsandbytes,
    compressed-tensors."""
    inner = values.get("text_config")
    for key in ("quantization_config", "compression_config", "quantization"):
        said = values.get(key) or (inner.get(key) if isinstance(inner, dict) else None)
        if said:
            how = said.get("quant_method") or said.get("quant_algo") or key if isinstance(said, dict) else said
            raise ValueError(
                f"{where}: {key}: {how!r:.60}: quantised weights are not read from safetensors; accepted: a folder "
                "with float weights (F32, BF16, F16), or a GGUF file"
            )


def import_folder(
    folder: Path, config: Path | None = None, dtype: torch.dtype | None = None, told: Told | None = None
) -> Imported:
    """The model of a Hugging Face folder, on the CPU, ready for inference.

    dtype: null keeps what the files have. Raises ValueError that names the tensors which are missing, left over or of
    another shape, and FileNotFoundError.
    """
    with open_checkpoint(folder, config) as source:
        return load(source, dtype, told)


def load(source: Source, dtype: torch.dtype | None = None, told: Told | None = None) -> Imported:
    """Read tensor by tensor into a model without memory of its own, so that nothing is there twice."""
    plan, skipped = planned(source)
    with torch.device("meta"):
        model = LM(source.spec)
    for done, copy in enumerate(plan):
        given = [as_float(source.tensors.read(name), dtype) for name in copy.theirs]
        for name, value in zip(copy.place.names, copy.rule.read(given, copy.place), strict=True):
            put(model, name, value)
        if told is not None:
            told(done + 1, len(plan))
    return Imported(model.eval(), source.spec, source.family, source.unread, skipped)


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Make a tensor the parameter of this name."""
    place, _, leaf = name.rpartition(".")
    module = model.get_submodule(place)
    old = module.get_parameter(leaf)
    if old.shape != value.shape:
        raise ValueError(f"{name}: shape {tuple(value.shape)}, the model has {tuple(old.shape)}")
    # A view would keep the whole tensor it was cut from.
    value = value.contiguous().clone() if value._base is not None else value.contiguous()
    setattr(module, leaf, nn.Parameter(value, requires_grad=old.requires_grad))


def planned(source: Source) -> tuple[list[Copy], dict[str, str]]:
    """Which tensor fills which parameter, with every name in the form that the files have, checked against them."""
    there = source.tensors.names
    plan, missing = [], []
    for copy in copies(source.family, source.spec):
        theirs = tuple(spelled(name, source.family, there) for name in copy.theirs)
        missing += [name for name, found in zip(copy.theirs, theirs, strict=True) if found is None]
        plan.append(Copy(copy.rule, copy.place, tuple(found or name for name, found in zip(copy.theirs, theirs))))
        if len(missing) > MANY:
            break  # a configuration that promises more than any file has is not listed to its end
    if missing:
        count = f"{len(missing)}{' or more' if len(missing) > MANY else ''}"
        raise ValueError(f"{source.tensors.where}: {count} tensors are missing: {listed(missing)}")
    wanted = Counter(name for copy in plan for name in copy.theirs)
    if twice := [name for name, times in wanted.items() if times > 1]:
        raise ValueError(f"{source.tensors.where}: {listed(sorted(twice))} would be used twice")
    for copy in plan:
        for name, shape in zip(copy.theirs, copy.rule.shapes(copy.place), strict=True):
            if source.tensors.shape(name) != tuple(shape):
                told = f"shape {source.tensors.shape(name)}; the configuration says {tuple(shape)}"
                raise ValueError(f"{source.tensors.where}: {name}: {told} ({', '.join(copy.place.names)})")
    return plan, left_over(source, there - wanted.keys())


def left_over(source: Source, names: frozenset[str]) -> dict[str, str]:
    """Why each tensor that fills nothing may be left; ValueError for one that may not."""
    family = source.family
    skip = family.skip(source.spec) if hasattr(family, "skip") else getattr(family, "SKIP", {})
    same = getattr(source.family, "SAME", {})
    found, strange = {}, []
    for name in sorted(names):
        reason = next((why for pattern, why in skip.items() if matches(pattern, name)), None)
        twin = spelled(same[name], source.family, source.tensors.names) if name in same else None
        if reason is not None:
            found[name] = reason
        elif twin is not None:
            if not torch.equal(source.tensors.read(name), source.tensors.read(twin)):
                raise ValueError(f"{source.tensors.where}: {name} and {twin} differ, and the configuration ties them")
            found[name] = f"tied to {twin}"
        else:
            strange.append(name)
    if strange:
        raise ValueError(f"{source.tensors.where}: {len(strange)} tensors belong to nothing: {listed(strange)}")
    return found


def spelled(name: str, family: ModuleType, there: frozenset[str]) -> str | None:
    """A tensor's name as these files have it: as the family says it, or with another beginning, end, or both."""
    if name in there:
        return name
    found = [name]
    for said, other in getattr(family, "OTHERWISE", ()):
        found += [other + one.removeprefix(said) for one in found if one.startswith(said)]
        found += [one.removesuffix(said) + other for one in found if said and one.endswith(said)]
    return next((one for one in found if one in there), None)


def matches(pattern: str, name: str) -> bool:
    """`*` is one part of a dotted name; `**` at the end any number of them."""
    regex = re.escape(pattern).replace(r"\*\*", r".+").replace(r"\*", r"[^.]+")
    return re.fullmatch(regex, name) is not None


def listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
