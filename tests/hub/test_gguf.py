"""GGUF files give what the Hugging Face checkpoint gives that they were made from; damaged ones are refused at once."""

from __future__ import annotations

import logging
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from assay.hub import gguf as ours
from assay.hub.gguf import TYPES, read_gguf
from assay.hub.gguf_config import open_gguf
from assay.hub.load import import_folder, load
from assay.ops.step import rows_step
from tests.hub import tiny, write_gguf
from tests.model.hf import ids

logging.getLogger("transformers").setLevel(logging.ERROR)
PLAIN = {"rope_parameters": tiny.rope()}
CHANGES: dict[str, dict[str, Any]] = {
    "llama": PLAIN,
    "mixtral": {**PLAIN, "sliding_window": None, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.0},
    "qwen2": {**PLAIN, "use_sliding_window": False, "tie_word_embeddings": True},
    "qwen3": {**PLAIN, "attention_bias": False},
    "qwen3_moe": {**PLAIN, "mlp_only_layers": [], "router_aux_loss_coef": 0.0},
    "olmo2": {},
    "granite": PLAIN,
    "gemma2": PLAIN,
    "gemma3_text": {
        "num_hidden_layers": 7,
        "layer_types": [tiny.SLIDING] * 5 + [tiny.FULL, tiny.SLIDING],
        "rope_parameters": {tiny.FULL: tiny.rope(900.0), tiny.SLIDING: tiny.rope(10_000.0)},
    },
}
"""From the tests' tiny families: what a GGUF file has keys for."""


def made(name: str, folder: Path, **changes: Any) -> Any:
    config, model, values = tiny.FAMILIES[name]
    theirs = tiny.randomised(
        model(config(**{**values, **CHANGES[name], **changes}, attn_implementation="eager")), seed=3
    )
    theirs.save_pretrained(folder)
    return theirs


def write(folder: Path, theirs: Any, **how: Any) -> Path:
    path = folder / "model.gguf"
    write_gguf.write(path, theirs.config, load_file(folder / "model.safetensors"), **how)
    return path


@pytest.mark.parametrize("name", CHANGES)
def test_an_architecture_gives_the_spec_and_the_weights_of_its_folder(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, made(name, tmp_path))
    expected = import_folder(tmp_path)
    with open_gguf(path) as source:
        got = load(source)
    assert got.spec == expected.spec
    assert (got.unread, got.skipped) == ((), {})
    weights = dict(expected.model.named_parameters())
    for parameter, value in got.model.named_parameters():
        exact = not ((name.startswith("gemma") and "norm" in parameter) or "_post" in parameter)
        torch.testing.assert_close(value, weights[parameter], rtol=0, atol=0 if exact else 3e-7)


def test_quantised_weights_give_what_transformers_makes_of_the_file(tmp_path: Path) -> None:
    theirs = made("llama", tmp_path, attention_bias=False, mlp_bias=False)
    path = write(tmp_path, theirs, kind=Type.Q4_0, more=lambda writer: writer.add_vocab_size(tiny.VOCAB))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).eval()
    with open_gguf(path) as source:
        got = load(source)
    x = ids(2, 14)
    with torch.no_grad():
        logits = got.model(rows_step(x)).logits.view(2, 14, -1)
        torch.testing.assert_close(logits, theirs(x).logits, rtol=1e-4, atol=1e-4)


NUMBERS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "NVFP4"]
NUMBERS += ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0"]
NUMBERS += ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"]
OTHERS = ["Q8_1", "Q8_K", "Q1_0", "I8", "I16", "I32", "I64", "F64"]


def test_all_types_of_the_package_are_named_here() -> None:
    assert {kind.name for kind in Type} == {*NUMBERS, *OTHERS} and set(NUMBERS) == TYPES


@pytest.mark.parametrize("kind", OTHERS)
def test_a_type_that_the_package_does_not_turn_into_numbers_is_refused(kind: str, tmp_path: Path) -> None:
    block, _ = gguf.GGML_QUANT_SIZES[Type[kind]]
    path = tmp_path / "a.gguf"
    path.write_bytes(file(1, 0, tensor(shape=(block,), kind=Type[kind].value), data=512))
    with pytest.raises(ValueError, match=rf"w: type {Type[kind].value} \({kind}\); accepted: BF16, F16, F32, IQ1_M"):
        read_gguf(path)


def test_nvidias_four_bits_are_these_numbers(tmp_path: Path) -> None:
    """By the format's words: 64 numbers of 4 bits (E2M1), and for each 16 a scale of 8 bits (E4M3 without a sign)."""
    scales, codes = np.array([0x38, 0x40, 0x30, 0x01], np.uint8), np.arange(32, dtype=np.uint8) * 7 + 3
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("w", np.concatenate([scales, codes])[None], raw_dtype=Type.NVFP4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    wanted = []
    for part, scale in enumerate((1.0, 2.0, 0.5, 2.0**-9)):
        nibbles = [code & 15 for code in codes[8 * part :][:8]] + [code >> 4 for code in codes[8 * part :][:8]]
        wanted += [scale * magnitudes[n & 7] * (-1 if n & 8 else 1) for n in nibbles]
    assert read_gguf(tmp_path / "a.gguf").read("w").flatten().tolist() == wanted


@pytest.mark.parametrize("kind", NUMBERS)
def test_every_type_becomes_the_numbers_that_the_package_gives(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any bytes are blocks of any type; read whole, in pieces, and one slice of three."""
    monkeypatch.setattr(ours, "PIECE", 768)
    block, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    width = 2 * max(block, 256)
    data = np.random.default_rng(5).integers(0, 256, (3, 2, width // block * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("pad", np.zeros(3, np.float32))
    writer.add_tensor("w", data, raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = gguf.GGUFReader(tmp_path / "a.gguf").tensors[1]
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type))).view(3, 2, width)
        file = read_gguf(tmp_path / "a.gguf")
        torch.testing.assert_close(file.read("w"), expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(file.read("w", 1), expected[1], rtol=0, atol=0, equal_nan=True)


def test_llama3s_rule_is_found_from_its_factors_and_others_are_refused(tmp_path: Path) -> None:
    rule = {**tiny.rope(5e5, **tiny.LLAMA3), "factor": 32.0, "original_max_position_embeddings": 8192}
    theirs = made("llama", tmp_path, rope_parameters=rule, max_position_embeddings=131_072)
    found = ROPE_INIT_FUNCTIONS["llama3"](theirs.config, "cpu")[0]
    plain = 1.0 / 5e5 ** (torch.arange(0, 8, 2) / 8)

    def factors(scale: float) -> Callable[[gguf.GGUFWriter], None]:
        return lambda writer: writer.add_tensor("rope_freqs.weight", (scale * plain / found).numpy())

    with open_gguf(write(tmp_path, theirs, more=factors(1.0))) as source:
        assert source.spec == import_folder(tmp_path).spec
    with (
        pytest.raises(ValueError, match=r"rope_freqs\.weight: not the factors of Llama 3's rule"),
        open_gguf(write(tmp_path, theirs, more=factors(1.1))),
    ):
        pass


Change = Callable[[gguf.GGUFWriter], None]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (lambda w: w.add_block_count(9**9), "llama.block_count: 387420489; the tensors show 2"),
        (lambda w: w.add_embedding_length(64), "llama.embedding_length: 64; the tensors show 32"),
        (lambda w: w.add_head_count(0), "llama.attention.head_count: 0; 1 or more"),
        (lambda w: w.add_head_count([4, 2]), "llama.attention.head_count: differs between layers"),
        (lambda w: w.add_rope_dimension_count(4), "llama.rope.dimension_count: 4; accepted: 8"),
        (lambda w: w.add_vocab_size(3), "llama.vocab_size: 3; accepted: 61"),
        (lambda w: w.add_expert_count(10**9), "llama.expert_count: 1000000000; the tensors of layer 0 show 0"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "rope.scaling.type: 'longrope'; accepted"),
        (lambda w: w.add_tensor("strange.weight", np.zeros(2, np.float32)), "belong to nothing: strange.weight"),
        (lambda w: w.add_tensor("model.norm.weight", np.zeros(2, np.float32)), "are both model.norm.weight"),
    ],
)
def test_values_that_the_tensors_do_not_bear_out_are_refused(more: Change, message: str, tmp_path: Path) -> None:
    def instead(writer: gguf.GGUFWriter) -> None:
        before = dict(writer.kv_data[0])
        writer.kv_data[0].clear()
        more(writer)
        writer.kv_data[0].update({key: value for key, value in before.items() if key not in writer.kv_data[0]})

    path = write(tmp_path, made("llama", tmp_path), more=instead)
    with pytest.raises(ValueError, match=message), open_gguf(path) as source:
        load(source)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(key: str, kind: int, data: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + data


def tensor(name: str = "w", shape: tuple[int, ...] = (32,), kind: int = 0, at: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, at)


def file(tensors: int, values: int, body: bytes, version: int = 3, data: int = 256) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, values) + body
    return head + bytes(-len(head) % 32 + data)


U32, ARRAY, STRING = 4, 9, 8
HUGE = 1 << 62
BAD = {
    "empty": (b"", "0 bytes: not a GGUF file"),
    "other magic": (b"GGML" + bytes(40), "does not begin with GGUF"),
    "version 1": (file(0, 0, b"", version=1), "GGUF version 1; accepted: 2, 3"),
    "big endian": (file(0, 0, b"", version=3 << 24), "written for a big-endian machine"),
    "tensors": (file(HUGE, 0, b""), f"tensors: {HUGE} are announced"),
    "values": (file(0, HUGE, b""), f"values: {HUGE} are announced"),
    "name's length": (file(0, 1, struct.pack("<Q", HUGE)), f"a string of {HUGE} bytes; at most 1024"),
    "string's length": (file(0, 1, value("a", STRING, struct.pack("<Q", 5000))), "a: 5000 bytes are announced and"),
    "array's length": (file(0, 1, value("a", ARRAY, struct.pack("<IQ", U32, HUGE))), f"a: {HUGE} are announced"),
    "array of arrays": (file(0, 1, value("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 99)), "nested more than 4 deep"),
    "type of a value": (file(0, 1, value("a", 13, b"")), "a: type 13 of a value; accepted: 0 to 12"),
    "not UTF-8": (file(0, 1, value("a", STRING, struct.pack("<Q", 1) + b"\xff")), "a: not UTF-8"),
    "unprintable": (file(0, 1, value("a\x1b[2J", U32, bytes(4))), "printable characters are expected"),
    "value twice": (file(0, 2, value("a", U32, bytes(4)) * 2), "a: stands twice"),
    "alignment": (file(0, 1, value("general.alignment", U32, struct.pack("<I", 48))), "alignment: 48; a power of two"),
    "no alignment": (file(0, 1, value("general.alignment", U32, bytes(4))), "alignment: 0; a power of two"),
    "one of many": (file(0, 1, value("split.count", U32, struct.pack("<I", 3))), "one of 3 files; merge them"),
    "axes": (file(1, 0, tensor(shape=(1,) * 5)), "w: 5 axes; accepted: 1 to 4"),
    "many axes": (file(1, 0, text("w") + struct.pack("<I", 1 << 31)), f"w: {1 << 31} axes"),
    "no size": (file(1, 0, tensor(shape=(32, 0))), r"w: shape \(0, 32\); sizes of 1 or more"),
    "part of a block": (file(1, 0, tensor(shape=(33,), kind=2)), "rows of whole blocks of 32"),
    "type": (file(1, 0, tensor(kind=999)), "w: type 999; accepted: BF16, F16, F32"),
    "integers": (file(1, 0, tensor(kind=26)), r"w: type 26 \(I32\); accepted"),
    "size overflows": (file(1, 0, tensor(shape=(1 << 32, 1 << 32))), "w: bytes .* the file has"),
    "outside": (file(1, 0, tensor(at=1 << 40)), "w: bytes .* the file has"),
    "place overflows": (file(1, 0, tensor(at=(1 << 64) - 32)), "w: bytes .* the file has"),
    "crooked": (file(1, 0, tensor(at=4)), "w: begins at 4, which is no multiple of the alignment 32"),
    "overlap": (file(2, 0, tensor() + tensor("v", at=32)), "v: its bytes are also those of w"),
    "tensor twice": (file(2, 0, tensor() + tensor(at=128)), "w: stands twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_headers_that_lie_are_refused_before_anything_is_made_of_them(name: str, tmp_path: Path) -> None:
    data, message = BAD[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        read_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = file(1, 1, value("a", ARRAY, struct.pack("<IQ", STRING, 2) + text("b") + text("c")) + tensor(), data=128)
    path = tmp_path / "a.gguf"
    path.write_bytes(whole)
    assert read_gguf(path).metadata == {"a": ["b", "c"]}
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.gguf: "):
            read_gguf(path)
