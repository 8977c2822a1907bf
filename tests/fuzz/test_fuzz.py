"""Good files with bytes changed, cut out, repeated or made extreme numbers are read or refused, never worse."""

from __future__ import annotations

import json
import struct
import tracemalloc
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from tests.fuzz.targets import TARGETS, holds

PEAK = 100_000_000
"""Bytes that a target may hold at once for a file of a few thousand."""
NUMBERS = [0, 1, 255, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 60,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
YAML = b"base: &a {x: 1, y: [1, 2.5, true]}\nlist: [*a, *a]\ntext: |\n  two\n  lines\nmore: {<<: *a, z: 4e-3}\n"


def small_gguf() -> bytes:
    """A llama of one layer with a byte-level tokenizer."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(32)
        writer.add_block_count(1)
        writer.add_feed_forward_length(32)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["a", "b", "ab", "<|end|>"])
        writer.add_token_types([1, 1, 1, 3])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(3)
        shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
        shapes |= {"ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32)}
        shapes = {f"blk.0.{name}": shape for name, shape in shapes.items()} | {"token_embd": (4, 32)}
        for name, shape in shapes.items():
            value = np.ones(shape, np.float32)
            writer.add_tensor(
                f"{name}.weight",
                gguf.quantize(value, gguf.GGMLQuantizationType.Q8_0),
                raw_dtype=gguf.GGMLQuantizationType.Q8_0,
            )
        for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
            writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


@cache
def seed(name: str) -> bytes:
    made = {
        "gguf": small_gguf,
        "safetensors": lambda: save({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16)}),
        "config": lambda: json.dumps(CONFIG).encode(),
        "yaml": lambda: YAML,
    }
    return made[name]()


@st.composite
def changed(draw: st.DrawFn, good: bytes) -> bytes:
    """A good file after one to four changes, most of them near its beginning, where the headers are."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(len(data), draw(st.sampled_from([64, 1024, len(data)]))) - 1)))
        size = draw(st.integers(1, 32))
        what = draw(st.sampled_from(["flip", "number", "cut", "end", "repeat", "bytes"]))
        if what == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "number":
            form = draw(st.sampled_from(["<Q", "<I"]))
            number = struct.pack(form, draw(st.sampled_from(NUMBERS)) % (1 << 8 * struct.calcsize(form)))
            data[at : at + len(number)] = number
        elif what == "cut":
            del data[at : at + size]
        elif what == "end":
            del data[at:]
        elif what == "repeat":
            data[at:at] = data[at : at + size]
        else:
            data[at:at] = draw(st.binary(max_size=16))
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_the_good_files_are_good(name: str) -> None:
    assert holds(name, seed(name))


def look(name: str, examples: int) -> None:
    """Any number of changed files; the first that is a defect is made small and shown."""

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(changed(seed(name)))
    def each(data: bytes) -> None:
        tracemalloc.start()
        try:
            holds(name, data)
            assert tracemalloc.get_traced_memory()[1] < PEAK
        finally:
            tracemalloc.stop()

    each()


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_are_read_or_refused(name: str) -> None:
    look(name, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_changed_files_are_read_or_refused(name: str) -> None:
    look(name, 3000)
