"""Good files to begin a search from: small, and together of every kind that is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from assay.hub.gguf import TYPES
from assay.hub.gguf_names import ARCHITECTURES, EXPERT_LLAMA, LAYER, Architecture

LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "vocab_size": 10,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
WIDTH, ROWS = 32, 4
FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
OTHERS = ("bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
Header = Callable[[gguf.GGUFWriter], None]


def seeds(name: str) -> Iterator[bytes]:
    """The good files of a target. For configurations one of every family, which needs transformers."""
    yield from GOOD[name]()


def ggufs() -> Iterator[bytes]:
    """A model of every architecture with one of the tokenizers; a row of every type of numbers."""
    words: dict[str, Header] = {"llama": sentences, "gemma2": pieces, "gemma3": pieces}
    for name, known in {**ARCHITECTURES, "mixtral": EXPERT_LLAMA}.items():
        yield model_file("llama" if name == "mixtral" else name, known, words.get(name, byte_level))
    for kind in sorted(TYPES):
        _, size = GGML_QUANT_SIZES[Type[kind]]
        row = np.random.default_rng(3).integers(0, 128, (1, size), np.uint8)
        yield written("llama", byte_level, {"token_embd.weight": (row, Type[kind])})


def model_file(arch: str, known: Architecture, tokenizer: Header) -> bytes:
    """One layer, 32 wide, two heads and one of keys, two experts where there are any; matrices in Q8_0."""
    names = {**LAYER, **known.names}
    inner = [n for n in names if "norm" not in n or n in wanted_norms(arch)]
    expert = [n for n in inner if n.endswith("_exps")]
    inner = [n for n in inner if not (expert and n in ("ffn_gate", "ffn_up", "ffn_down"))]
    narrow = {"attn_k": 16, "attn_v": 16, "ffn_gate_inp": 2}
    tensors: dict[str, tuple[np.ndarray, Type]] = {
        "token_embd.weight": matrix(ROWS),
        "output_norm.weight": vector(WIDTH),
    }
    for name in inner:
        if "norm" in name:
            size = WIDTH if name not in ("attn_q_norm", "attn_k_norm") else q_norm(arch, name)
            tensors[f"blk.0.{name}.weight"] = vector(size)
        else:
            tensors[f"blk.0.{name}.weight"] = matrix(*((2, WIDTH) if name in expert else (narrow.get(name, WIDTH),)))
    if arch == "qwen2":
        for name, size in (("attn_q", WIDTH), ("attn_k", 16), ("attn_v", 16)):
            tensors[f"blk.0.{name}.bias"] = vector(size)

    def header(writer: gguf.GGUFWriter) -> None:
        for add in (writer.add_context_length, writer.add_embedding_length, writer.add_feed_forward_length):
            add(WIDTH)
        writer.add_block_count(1)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(1e4)
        if expert:
            writer.add_expert_count(2)
            writer.add_expert_used_count(1)
            writer.add_expert_feed_forward_length(WIDTH)
        if arch.startswith("gemma"):
            writer.add_sliding_window(8)
        if arch == "granite":
            for scale in (writer.add_attention_scale, writer.add_embedding_scale, writer.add_residual_scale):
                scale(0.5)
            writer.add_logit_scale(2.0)
        tokenizer(writer)

    return written(arch, header, tensors)


def wanted_norms(arch: str) -> set[str]:
    """The norms of a layer: where they stand differs."""
    usual = {"attn_norm", "ffn_norm"}
    after = {"post_attention_norm", "post_ffw_norm"}
    queries = {"attn_q_norm", "attn_k_norm"} if arch in ("qwen3", "qwen3moe", "gemma3", "olmo2") else set()
    return queries | ({"gemma2": usual | after, "gemma3": usual | after, "olmo2": after}.get(arch, usual))


def q_norm(arch: str, name: str) -> int:
    """OLMo 2 normalises all heads together."""
    return WIDTH if arch == "olmo2" and name == "attn_q_norm" else 16


def matrix(*rows: int) -> tuple[np.ndarray, Type]:
    return gguf.quantize(np.ones((*rows, WIDTH), np.float32), Type.Q8_0), Type.Q8_0


def vector(size: int) -> tuple[np.ndarray, Type]:
    return np.ones(size, np.float32), Type.F32


def byte_level(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab", "<|end|>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(3)
    writer.add_eos_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages[0].content }}")


def sentences(writer: gguf.GGUFWriter) -> None:
    """SentencePiece: merges follow from the scores."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "\u2581a", "\u2581"])
    writer.add_token_scores([0.0, 0.0, -1.0, -2.0])
    writer.add_token_types([2, 3, 1, 1])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)


def pieces(writer: gguf.GGUFWriter) -> None:
    """Gemma's: the order of the tokens is that of the merges, and spaces stand as they are."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "  ", "ab", "a"])
    writer.add_token_scores([-1000.0] * 4)
    writer.add_token_types([2, 4, 1, 1])
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(False)


def written(arch: str, header: Header, tensors: dict[str, tuple[np.ndarray, Type]]) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        writer = gguf.GGUFWriter(path, arch)
        header(writer)
        for name, (value, kind) in tensors.items():
            writer.add_tensor(name, value, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def safetensors() -> Iterator[bytes]:
    """The tensors of `LLAMA`; each type of numbers; nothing at all; a tensor without numbers; metadata."""
    norms = {f"model.layers.0.{n}_layernorm.weight": (8,) for n in ("input", "post_attention")}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (10, 8), "model.norm.weight": (8,), **norms}
    shapes |= {f"model.layers.0.self_attn.{n}_proj.weight": (4 if n in "kv" else 8, 8) for n in "qkvo"}
    shapes |= {f"model.layers.0.mlp.{n}_proj.weight": (12, 8) for n in ("gate", "up")}
    shapes |= {"model.layers.0.mlp.down_proj.weight": (8, 12)}
    yield save({name: torch.ones(shape, dtype=torch.float16) for name, shape in shapes.items()}, {"format": "pt"})
    for kind in (*FLOATS, *OTHERS):
        yield save({"a": torch.zeros(2, 3).to(getattr(torch, kind))})
    yield save({})
    yield save({"empty": torch.zeros(0, 7), "scalar": torch.tensor(1.0)}, {"format": "pt", "": "x"})


def tokenizers() -> Iterator[bytes]:
    """A tokenizer.json of every model, with the pieces that stand around models."""
    letters = {c: i for i, c in enumerate(["[UNK]", "[CLS]", "a", "b", "ab", "\u2581a"])}
    merges, unknown = [("a", "b")], "[UNK]"
    bpe = models.BPE(vocab=letters, merges=merges, unk_token=unknown, byte_fallback=True)
    byte = models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "\u0120": 3}, merges=merges, ignore_merges=True)
    unigram = models.Unigram([(c, -float(i)) for c, i in letters.items()], unk_id=0, byte_fallback=False)
    template = processors.TemplateProcessing(single="[CLS] $A", pair="[CLS] $A $B", special_tokens=[("[CLS]", 1)])
    split = pre_tokenizers.Split(Regex(r"\p{N}|\s+"), "isolated")
    around: list[tuple[Any, Any, Any, Any, Any]] = [
        (models.WordLevel(letters, unk_token=unknown), None, pre_tokenizers.Whitespace(), None, None),
        (models.WordPiece(letters, unk_token=unknown), normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(),
         decoders.WordPiece(), template),
        (byte, normalizers.NFC(), pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(use_regex=False)]),
         decoders.ByteLevel(), processors.ByteLevel()),
        (bpe, normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]), None,
         decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]), template),
        (unigram, normalizers.Lowercase(), pre_tokenizers.Metaspace(), decoders.Metaspace(), None),
    ]  # fmt: skip
    for model, normalizer, pre, decoder, post in around:
        made = Tokenizer(model)
        made.normalizer, made.pre_tokenizer, made.decoder, made.post_processor = normalizer, pre, decoder, post
        made.add_special_tokens(["<s>"])
        yield made.to_str().encode()


def configs() -> Iterator[bytes]:
    from assay.hub.family import families
    from tests.fuzz.test_configs import written as default

    yield json.dumps(LLAMA).encode()
    for kind in families():
        yield default(kind).encode()


def yamls() -> Iterator[bytes]:
    yield b"base: &a {x: 1, y: [1, 2.5, true]}\nlist: [*a, *a]\ntext: |\n  two\n  lines\nmore: {<<: *a, z: 4e-3}\n"


GOOD: dict[str, Callable[[], Iterator[bytes]]] = {
    "gguf": ggufs,
    "safetensors": safetensors,
    "config": configs,
    "tokenizer": tokenizers,
    "yaml": yamls,
}
