"""What an imported model is compared with: a mapping of tensors, from a safetensors file or from transformers itself.

input_ids [R, T]             integers
logits [R, T, V]
hidden.0 .. hidden.L         [R, T, D]: the input of each layer, and the last layer's output before the final norm
final [R, T, D]              after it
greedy_ids, greedy_logits    [R, n], [R, n, V]: a cached continuation of input_ids by the likeliest token
leftpad.*, rightpad.*        input_ids and attention_mask [R, T] (1 is a token), logits [R, T, V]

Of an encoder-decoder input_ids are the source; decoder_input_ids [R, U] the tokens that logits, hidden.* and final are
of, and their first column what a continuation begins with; enc.hidden.*, enc.final [R, T, D] are the encoder's. Of a
classifier logits are [R, labels].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from assay.engine.config import position_limit
from assay.hub.config import is_number
from assay.hub.live import GREEDY
from assay.spec.model import ModelSpec

PADS = ("leftpad", "rightpad")
Reference = Mapping[str, Tensor]


def read_reference(path: Path, spec: ModelSpec) -> dict[str, Tensor]:
    """A reference file for a model of this spec. ValueError names what is missing or does not fit."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        found: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{path}: not a safetensors file, or one that was cut short: {error}") from None
    pads = [f"{pad}.{name}" for pad in PADS for name in ("input_ids", "attention_mask") if f"{pad}.logits" in found]
    wanted = required(spec, [f"{pad}." for pad in PADS if f"{pad}.logits" in found])
    for name in (*wanted, *pads):
        if name not in found:
            raise ValueError(f"{path}: {name}: missing; a reference has {', '.join((*wanted, *pads))}")
    for name, value in found.items():
        if name.endswith(("input_ids", "greedy_ids")):
            check_ids(f"{path}: {name}", value, spec.vocab)
    for name, shape in shapes(found, spec).items():
        if name in found and tuple(found[name].shape) != shape:
            raise ValueError(f"{path}: {name}: shape {tuple(found[name].shape)}; {shape} is expected")
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


def required(spec: ModelSpec, pads: Sequence[str]) -> tuple[str, ...]:
    """What a reference has at least: a model without a head is known by its features."""
    own = tuple(f"{pad}decoder_input_ids" for pad in ("", *pads)) if spec.encoder is not None else ()
    return ("input_ids", *own, "logits" if spec.head is not None else "final")


def check_ids(where: str, ids: Tensor, vocab: int) -> None:
    if ids.is_floating_point() or ids.dim() != 2 or not ids.numel():
        raise ValueError(f"{where}: {ids.dtype} {tuple(ids.shape)}; integers [rows, tokens] are expected")
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise ValueError(f"{where}: ids {int(ids.min())} to {int(ids.max())}; the model has 0 to {vocab - 1}")


def shapes(found: Reference, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """What the tensors of a reference look like for its input ids and this spec."""
    d, v, source = spec.d_model, spec.vocab, tuple(found["input_ids"].shape)
    grid = source if spec.encoder is None else tuple(found["decoder_input_ids"].shape)
    made: dict[str, tuple[int, ...]] = {f"hidden.{i}": (*grid, d) for i in range(spec.layers + 1)}
    made |= {"final": (*grid, d)}
    if spec.head is not None and spec.head.names_tokens:
        made["logits"] = (*grid, v)
    if spec.encoder is not None:
        inside = {f"hidden.{i}" for i in range(spec.encoder.layers + 1)} | {"final"}
        made |= {f"enc.{name}": (*source, spec.encoder.d_model) for name in inside}
    for pad in PADS:
        if f"{pad}.input_ids" in found:
            padded = tuple(found[f"{pad}.input_ids"].shape)
            own = tuple(found[f"{pad}.decoder_input_ids"].shape) if spec.encoder is not None else padded
            made[f"{pad}.attention_mask"] = padded
            if "logits" in made:
                made[f"{pad}.logits"] = (*own, v)
    if "greedy_ids" in found:
        said = (grid[0], found["greedy_ids"].shape[1])
        made |= {"greedy_ids": said, "greedy_logits": (*said, v)}
    return made


def sample(spec: ModelSpec, tokens: int, rows: int = 2) -> Int[Tensor, "R T"]:
    """Random ids, the same every time; as many as leave room for a continuation."""
    limit = position_limit(spec)
    length = tokens if limit is None else max(1, min(tokens, limit - GREEDY))
    return torch.randint(0, spec.vocab, (rows, length), generator=torch.Generator().manual_seed(0))


def numbers_of(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a configuration by dotted key."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= numbers_of(value, f"{prefix}{key}.")
        elif is_number(value):
            found[f"{prefix}{key}"] = float(value)
    return found
