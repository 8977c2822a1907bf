"""A GGUF file as a checkpoint: its values become a Hugging Face configuration, so each model has one definition, its
family's.

Source of what the values mean: convert_hf_to_gguf.py and src/llama-model.cpp of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.hub.config import Tree, is_number
from assay.hub.family import read
from assay.hub.gguf import Gguf, read_gguf
from assay.hub.gguf_names import ARCHITECTURES, EXPERT_LLAMA, USUAL, Architecture, Renamed
from assay.hub.load import Source

LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
"""Layers of the one size whose queries are scaled by d_model / heads; a file does not say so (llama.cpp's rule)."""


@contextmanager
def open_gguf(path: Path) -> Iterator[Source]:
    """A GGUF file as a configuration with tensors. ValueError for a damaged file, an architecture nobody reads, and
    values that no family can honour."""
    yield source_of(read_gguf(path))


def source_of(file: Gguf) -> Source:
    values = Values(file)
    architecture = architecture_of(values)
    config = config_of(values, architecture)
    tensors = Renamed(file, architecture, config)
    found = read(config, file.where, tensors.names)
    unread = (*(f"{values.prefix}.{key}" for key in values.unread()), *found.unread)
    return Source(found.spec, found.family, unread, tensors)


class Values:
    """A file's values about its model, and which of them were asked for."""

    def __init__(self, file: Gguf) -> None:
        self.file, self.where = file, file.where
        prefix = file.metadata.get("general.architecture")
        if not isinstance(prefix, str) or not prefix:
            raise ValueError(f"{file.where}: general.architecture: {prefix!r:.80}; a name is expected")
        self.prefix = prefix
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """A number by its key without the architecture's name; a list of equal numbers, one a layer, is that number."""
        self._read.add(key)
        value = self.file.metadata.get(f"{self.prefix}.{key}", default)
        if isinstance(value, list):
            if not value or any(v != value[0] for v in value):
                raise ValueError(f"{self.where}: {self.prefix}.{key}: differs between layers: {value!r:.80}")
            value = value[0]
        return shortest(value) if isinstance(value, float) else value

    def whole(self, key: str, default: Any = None) -> Any:
        value = self.get(key, default)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise ValueError(f"{self.where}: {self.prefix}.{key}: {value!r:.80}; a whole number is expected")
        return value

    def number(self, key: str, default: Any = None) -> Any:
        value = self.get(key, default)
        if value is not None and (not is_number(value) or value <= 0):
            raise ValueError(f"{self.where}: {self.prefix}.{key}: {value!r:.80}; a number above 0 is expected")
        return value

    def must_be(self, key: str, accepted: Any) -> None:
        value = self.get(key)
        if value is not None and value != accepted:
            raise ValueError(f"{self.where}: {self.prefix}.{key}: {value!r:.80}; accepted: {accepted}")

    def size(self, tensor: str, axis: int) -> int:
        """A size of a tensor that every model here has."""
        entry = self.file.tensors.get(tensor)
        if entry is None or not -len(entry.shape) <= axis < len(entry.shape):
            raise ValueError(f"{self.where}: {tensor}: missing, or of another shape than a model's")
        return entry.shape[axis]

    def unread(self) -> list[str]:
        there = [k.removeprefix(f"{self.prefix}.") for k in self.file.metadata if k.startswith(f"{self.prefix}.")]
        return sorted(key for key in there if key not in self._read)


def shortest(value: float) -> float:
    """The shortest decimal that is this number in float32: files keep 1e-05 as 9.999999747378752e-06."""
    return float(str(np.float32(value))) if math.isfinite(value) else value


def architecture_of(values: Values) -> Architecture:
    found = ARCHITECTURES.get(values.prefix)
    if found is None:
        accepted = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(f"{values.where}: general.architecture: {values.prefix!r:.80}; accepted: {accepted}")
    return EXPERT_LLAMA if found.model_type == "llama" and values.whole("expert_count", 0) else found


def config_of(values: Values, architecture: Architecture) -> Tree:
    """The configuration that the file's values spell. What a tensor shows too must agree with it: a model is not
    planned from a number that the file does not bear out."""
    tensors, prefix = values.file.tensors, values.prefix
    found: Tree = {"model_type": architecture.model_type, **architecture.fixed}
    for theirs, ours in {**USUAL, **architecture.keys}.items():
        if (value := values.get(theirs)) is not None:
            found[ours] = value
    width, heads = values.whole("embedding_length"), values.whole("attention.head_count")
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    for key, shown in (("block_count", len(blocks)), ("embedding_length", values.size("token_embd.weight", -1))):
        if values.whole(key) != shown:
            raise ValueError(f"{values.where}: {prefix}.{key}: {values.whole(key)}; the tensors show {shown}")
    if not heads:
        raise ValueError(f"{values.where}: {prefix}.attention.head_count: {heads}; 1 or more is expected")
    head_dim = values.whole("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        values.must_be(key, head_dim)
    found |= {"head_dim": head_dim, "vocab_size": values.size("token_embd.weight", 0)}
    values.must_be("vocab_size", found["vocab_size"])
    found["tie_word_embeddings"] = "output.weight" not in tensors
    if "blk.0.attn_q.bias" in tensors and architecture.model_type != "qwen2":
        found["attention_bias"] = True
    found |= scaling(values, head_dim) | special(values, head_dim) | experts(values)
    if "blk.0.ffn_up.bias" in tensors:
        found["mlp_bias"] = True
    return found


def experts(values: Values) -> Tree:
    """As many experts as are named: their tensors bear it out."""
    count = values.whole("expert_count", 0)
    if not count:
        return {}
    separate = sum(name.startswith("blk.0.ffn_down.") and name.count(".") == 4 for name in values.file.tensors)
    at = values.file.tensors.get("blk.0.ffn_down_exps.weight")
    shown = at.shape[0] if at is not None else separate
    if count != shown:
        raise ValueError(f"{values.where}: {values.prefix}.expert_count: {count}; the tensors of layer 0 show {shown}")
    return {}


def special(values: Values, head_dim: int) -> Tree:
    """What only Gemma says."""
    if values.prefix not in LARGEST_GEMMA:
        return {}
    largest = values.whole("block_count") == LARGEST_GEMMA[values.prefix]
    size = values.whole("embedding_length") // values.whole("attention.head_count") if largest else head_dim
    scale = values.number("attention.scale")
    found: Tree = {"query_pre_attn_scalar": size if scale is None else scale**-2}
    if values.prefix == "gemma3":
        found["sliding_window_pattern"] = values.whole("attention.sliding_window_pattern", 6)
        found["rope_local_base_freq"] = values.number("rope.freq_base_swa", 10_000.0)
        found.update({} if values.get("rope.freq_base") is not None else {"rope_theta": 1_000_000.0})
    return found


def scaling(values: Values, head_dim: int) -> Tree:
    """RoPE's scaling: by name, or as Llama 3.1's factors in a tensor."""
    kind = values.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in values.file.tensors:
        factors = values.file.read("rope_freqs.weight").flatten()
        return {"rope_scaling": llama3(factors, values.number("rope.freq_base", 10_000.0), head_dim, values.where)}
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn"):
        raise ValueError(
            f"{values.where}: {values.prefix}.rope.scaling.type: {kind!r:.80}; accepted: none, linear, yarn"
        )
    found: Tree = {"type": kind, "factor": values.number("rope.scaling.factor")}
    values.must_be("rope.scaling.attn_factor", 1.0)
    original = values.whole("rope.scaling.original_context_length")
    if kind == "yarn" and original is not None:
        found["original_max_position_embeddings"] = original
    return {"rope_scaling": found}


def llama3(factors: Tensor, theta: float, head_dim: int, where: str) -> Tree:
    """The rule that made the factors: files keep what each frequency is divided by, and not the rule.

    Llama 3.1 and 3.2 differ in the largest factor alone; any others are refused. Llama team 2024, arXiv 2407.21783.
    """
    if factors.shape != (head_dim // 2,):
        raise ValueError(f"{where}: rope_freqs.weight: shape {tuple(factors.shape)}; expected: ({head_dim // 2},)")
    factor = float(factors.max())
    waves = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((8192 / waves - 1.0) / 3.0).clamp(0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if not torch.allclose(factors.double(), expected, rtol=1e-4):
        raise ValueError(f"{where}: rope_freqs.weight: not the factors of Llama 3's rule (1, 4, 8192)")
    rule = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {**rule, "factor": factor, "original_max_position_embeddings": 8192}
