"""Checkpoints: a folder with a model, its tokenizer and, for a training run, what it takes to go on.

    model.yaml           the spec, every field, and `format`
    model.safetensors    the weights by dotted name; its metadata names the step
    tokenizer.json, tokenizer_config.json
    recipe.yaml          training runs only, as is all below
    state/<step>/        optimizer.safetensors (optimiser, random number generators) and run.json

A training run is saved again and again, and may be killed in between at any moment. `state/<step>` is complete before
model.safetensors, whose metadata names it, is put in place by one rename: that rename is the save. State that no
weights name is left over from a save that did not finish, and is removed by the next one.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from assay.data.tokenizers import Tokenizer
from assay.model.lm import LM, weight_table
from assay.spec.base import Spec
from assay.spec.load import dump, read_mapping, to_yaml, validate
from assay.spec.model import ModelSpec

FORMAT = 1
MODEL, WEIGHTS, RECIPE, STATE = "model.yaml", "model.safetensors", "recipe.yaml", "state"


@dataclass(frozen=True)
class Saved:
    """The state of a run after `step` steps: named tensors, and plain values that JSON holds."""

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


def save_checkpoint(folder: Path, model: LM, tokenizer: Tokenizer) -> None:
    """Write a checkpoint without training state: a model that is ready to be used."""
    describe(folder, model.spec, tokenizer)
    save_weights(folder, dict(model.named_parameters()), None)


def describe(folder: Path, spec: ModelSpec, tokenizer: Tokenizer, recipe: Spec | None = None) -> None:
    """Write what stays the same while a model is trained: tokenizer, recipe, and the spec last."""
    folder.mkdir(parents=True, exist_ok=True)
    with _room(folder):
        tokenizer.save(folder)
        if recipe is not None:
            replace(folder / RECIPE, lambda path: path.write_text(to_yaml(dump(recipe)), "utf-8"))
        tree = {"format": FORMAT, **dump(spec)}
        replace(folder / MODEL, lambda path: path.write_text(to_yaml(tree), "utf-8"))


def save_weights(folder: Path, weights: Mapping[str, Tensor], step: int | None) -> None:
    tensors = {name: p.detach().cpu().contiguous() for name, p in weights.items()}
    metadata = {"format": "pt"} | ({} if step is None else {"step": str(step)})
    replace(folder / WEIGHTS, lambda path: write_tensors(path, tensors, metadata))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata)
    path.chmod(mode)  # the library's own file is readable by its owner alone


def save_run(folder: Path, weights: Mapping[str, Tensor], saved: Saved) -> None:
    """Save a run that `describe` has begun. Until the last rename the folder holds the save before this one."""
    with _room(folder):
        place = folder / STATE / str(saved.step)
        part = folder / STATE / f".{saved.step}.part"
        for left in (part, place):
            shutil.rmtree(left, ignore_errors=True)
        try:
            part.mkdir(parents=True)
            tensors = {k: t.detach().cpu().contiguous() for k, t in saved.tensors.items()}
            write_tensors(part / "optimizer.safetensors", tensors, {"format": "pt"})
            (part / "run.json").write_text(json.dumps({"format": FORMAT, "step": saved.step, **saved.values}), "utf-8")
            for path in part.iterdir():
                sync(path)
            os.rename(part, place)
            sync(place.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        save_weights(folder, weights, saved.step)
    for other in (folder / STATE).iterdir():
        if other.name != str(saved.step):
            shutil.rmtree(other, ignore_errors=True)


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> tuple[LM, Tokenizer, ModelSpec]:
    """The model, ready for inference in the dtype it was saved in, its tokenizer and its spec.

    ValueError that names the file for one that is missing, cut short, or at odds with the others.
    """
    folder = Path(path)
    spec = load_spec(folder)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > spec.vocab:
        raise ValueError(f"{folder / 'tokenizer.json'}: {tokenizer.vocab_size} ids, the model has {spec.vocab}")
    model = LM(spec)
    read_weights(folder, model)
    return model.to(device).eval(), tokenizer, spec


def load_spec(folder: Path) -> ModelSpec:
    """The spec of a checkpoint. ValueError for a newer format."""
    path = folder / MODEL
    if not path.is_file():
        raise ValueError(f"{folder}: not a checkpoint: it has no {MODEL}")
    tree = read_mapping(path)
    version = tree.pop("format", None)
    if version != FORMAT:
        newer = isinstance(version, int) and version > FORMAT
        raise ValueError(
            f"{path}: format {version!r}; this assay reads {FORMAT}" + (": use a newer assay" if newer else "")
        )
    return validate(ModelSpec, tree, str(path))


def read_weights(folder: Path, model: LM) -> None:
    """Put the stored weights into the model, where it is and in their stored dtype."""
    found = stored_weights(folder, model.spec)
    for name, parameter in model.named_parameters():
        parameter.data = found[name].to(parameter.device)


def stored_weights(folder: Path, spec: ModelSpec) -> dict[str, Tensor]:
    """The weights of a checkpoint. ValueError unless they have the names and shapes of the spec's."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder}: holds no weights: it has no {WEIGHTS} (was its training stopped before a save?)")
    table, found = weight_table(spec), read_tensors(path)
    odd = sorted(table.keys() ^ found.keys())
    if odd:
        what = "lacks" if odd[0] in table else "holds"
        raise ValueError(f"{path}: {what} {odd[0]!r} ({len(odd)} names differ from those of {MODEL})")
    for name, weight in table.items():
        tensor = found[name]
        if tensor.shape != weight.shape or not tensor.is_floating_point():
            have = f"{list(tensor.shape)} {str(tensor.dtype)[6:]}"
            raise ValueError(f"{path}: {name} is {have}; {MODEL} says {list(weight.shape)} {weight.dtype}")
    return found


def read_run(folder: Path) -> Saved | None:
    """The last save of a run; None when it was stopped before its first."""
    if not (folder / WEIGHTS).exists():
        return None
    step = read_metadata(folder / WEIGHTS).get("step", "")
    if not step.isdigit():
        raise ValueError(f"{folder / WEIGHTS}: names no step: this checkpoint holds no training state to go on from")
    place = folder / STATE / step
    path = place / "run.json"
    if not path.is_file():
        raise ValueError(f"{path}: missing; {WEIGHTS} was saved at step {step} and its state is gone")
    try:
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: damaged: not JSON") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT or values.get("step") != int(step):
        raise ValueError(f"{path}: does not describe step {step} in format {FORMAT}")
    return Saved(int(step), read_tensors(place / "optimizer.safetensors"), values)


def read_metadata(path: Path) -> dict[str, str]:
    with _readable(path), safe_open(path, "pt") as file:
        return file.metadata() or {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, copied out of it: the file may be replaced while they are in use."""
    with _readable(path), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from None


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, wait until it is on the disk, and put it in place by a rename."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """A full disk is an OSError that says so, whichever library met it."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(folder)) from None
