"""Tokenizers out of GGUF files encode as the tokenizers that the files were made from; templates are found anywhere."""

from __future__ import annotations

import json
import string
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers as hf
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, convert_gguf_tokenizer

from assay.data.tokenizers import Tokenizer
from assay.engine.template import chat_template
from assay.hub.tokenizer import folder_tokenizer, gguf_tokenizer
from tests.fuzz import seeds

TEXT = Path(string.__file__).read_text("utf-8")
PROBES = (
    "def f(x):\n    return x**2  # it's 12 or 1234\n\n\n\tend",
    "a  1   22 !? don't DON'T\r\n ümlaut e\u0301 漢字🙂 <|im_start|> <think>",
    TEXT[:2000],
)
ROLES = {"bos_token_id": 0, "eos_token_id": 1, "unknown_token_id": 0}
SPECIAL = ["<|begin|>", "<|im_end|>"]


def cuts(pre: str) -> list[Any]:
    """The models' own first steps, from `tokenizers` and transformers."""
    if pre == "gpt-2":
        return [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if pre == "smollm":
        return [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), "isolated")
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def trained(pre: str) -> hf.Tokenizer:
    made = hf.Tokenizer(models.BPE(ignore_merges=pre in ("llama3", "tekken")))
    made.pre_tokenizer = pre_tokenizers.Sequence(cuts(pre))
    made.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        made.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return made


def values(made: hf.Tokenizer, **more: Any) -> dict[str, Any]:
    """As llama.cpp writes them."""
    model = json.loads(made.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    found = {
        "tokens": tokens,
        "token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "merges": [" ".join(merge) for merge in model["merges"]],
        **ROLES,
        **more,
    }
    return {"general.architecture": "llama"} | {f"tokenizer.ggml.{key}": value for key, value in found.items()}


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama3", "tekken"])
def test_a_byte_level_vocabulary_encodes_as_its_own_tokenizer_does(pre: str) -> None:
    expected = trained(pre)
    expected.encode_special_tokens = True
    got = gguf_tokenizer(values(expected, model="gpt2", pre=pre), "a.gguf")
    for text in PROBES:
        assert got.encode(text).tolist() == expected.encode(text).ids
        if pre != "qwen2":
            assert got.decode(got.encode(text)) == text
    assert (got.bos_id, got.eos_id, got.vocab_size) == (0, 1, 600)
    assert {got.hf.token_to_id(token) for token in SPECIAL} == {0, 1}
    assert all(got.hf.get_added_tokens_decoder()[i].special for i in (0, 1))


def sentencepiece(gemma: bool) -> dict[str, Any]:
    """A vocabulary with scores and no merges, learnt by BPE over words that begin with a space."""
    made = hf.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581*[^\u2581]+"), "isolated")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False))
    vocab = made.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    if gemma:
        tokens = [" " * len(t) if len(t) > 1 and not t.strip("\u2581") else t for t in tokens]
    kinds = [2, 3, 3, *[6] * 256, *[4 if gemma and not t.strip(" ") else 1 for t in tokens[259:]]]
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0 if i < 259 else 259.0 - i for i in range(len(tokens))],
        "token_type": kinds,
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_sentencepiece_vocabulary_encodes_as_in_transformers(architecture: str) -> None:
    found = sentencepiece(architecture == "gemma2")
    theirs = convert_gguf_tokenizer(architecture, {**found, "tokenizer_type": "llama"})[0]
    theirs.encode_special_tokens = True
    metadata = {"general.architecture": architecture} | {f"tokenizer.ggml.{k}": v for k, v in found.items()}
    got = gguf_tokenizer(metadata, "a.gguf")
    for text in PROBES:
        assert got.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids
        assert got.decode(got.encode(text)) == text
    assert got.vocab_size == len(found["tokens"])
    assert got.hf.encode("a").ids[0] == 1  # a file of this kind that says nothing begins texts with its first token


def test_a_space_stands_before_every_text_even_one_that_begins_with_a_space() -> None:
    """SentencePiece's add_dummy_prefix; transformers' Metaspace leaves it out there."""
    metadata = {"general.architecture": "llama"} | {f"tokenizer.ggml.{k}": v for k, v in sentencepiece(False).items()}
    got = gguf_tokenizer(metadata, "a.gguf")
    spelt = lambda text: "".join(got.hf.id_to_token(i) for i in got.encode(text))  # noqa: E731
    assert (spelt("a b"), spelt("  a b")) == ("\u2581a\u2581b", "\u2581\u2581\u2581a\u2581b")
    assert got.decode(got.encode("  a b")) == "  a b"
    none = gguf_tokenizer({**metadata, "tokenizer.ggml.add_space_prefix": False}, "a.gguf")
    assert none.encode("a").tolist() == [got.hf.token_to_id("a")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model: 'bert'; gpt2 .* or llama .* is expected"),
        ({"model": None}, "tokenizer.ggml.model: None; a value of type str|tokenizer.ggml.model: missing"),
        ({"pre": "klingon"}, "tokenizer.ggml.pre: 'klingon'; one of .*smollm"),
        ({"tokens": []}, "tokenizer.ggml.tokens: .*; a list of strings is expected"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "tokenizer.ggml.tokens: 'a' stands twice"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens: .*; a list of str is expected"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type: 1; 600 are expected"),
        ({"merges": ["a zzzz"]}, "tokenizer.ggml.merges: 'a zzzz': not two tokens that make a third"),
        ({"merges": ["ab"]}, "tokenizer.ggml.merges: 'ab': not two tokens"),
        ({"eos_token_id": 600}, "tokenizer.ggml.eos_token_id: 600; a token from 0 to 599 is expected"),
        ({"model": "llama", "merges": []}, "tokenizer.ggml.scores: missing; 600 numbers"),
        ({"model": "llama", "merges": [], "scores": ["x"]}, "tokenizer.ggml.scores: .*; a list of float"),
    ],
)
def test_vocabularies_that_do_not_fit_together_are_refused(changes: dict[str, Any], message: str) -> None:
    good = values(trained("gpt-2"), model="gpt2", pre="gpt-2")
    with pytest.raises(ValueError, match=message):
        gguf_tokenizer(good | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}, "a.gguf")


@pytest.mark.parametrize("role", ["unknown", "bos", "eos", "padding"])
def test_a_run_of_spaces_has_no_role_where_it_is_respelt(role: str) -> None:
    """Of Gemma's vocabulary, in which no token is called by the spaces any more."""
    found = sentencepiece(True)
    spaces = found["tokens"].index("  ")
    metadata = {"general.architecture": "gemma2"} | {f"tokenizer.ggml.{k}": v for k, v in found.items()}
    with pytest.raises(ValueError, match=rf"tokenizer\.ggml\.{role}_token_id: {spaces}; a token that is no run of"):
        gguf_tokenizer({**metadata, f"tokenizer.ggml.{role}_token_id": spaces}, "a.gguf")


def at(tree: Any, path: str) -> tuple[Any, str | int]:
    """What stands above a dotted path, and its last key."""
    *above, last = (int(key) if key.isdigit() else key for key in path.split("/"))
    for key in above:
        tree = tree[key]
    return tree, last


WORDS, PIECES, BYTES = range(3)  # of `seeds.tokenizers`


@pytest.mark.parametrize(
    ("which", "path", "value", "message"),
    [
        (WORDS, "model/unk_token", "nowhere", "not a tokenizer that encodes texts: .*"),
        (PIECES, "model/unk_token", "nowhere", "not a tokenizer that encodes texts: .*Missing"),
        (PIECES, "post_processor/single/0/SpecialToken/id", "[2LS]", "encodes texts: no entry found"),
        (PIECES, "post_processor/special_tokens/[CLS]/ids", [(1 << 31) - 1], "token 2147483647 stands around a text"),
        (WORDS, "model/vocab/[CLS]", 1 << 31, "the last token is 2147483648; 0 to 4194303 are accepted"),
        (BYTES, "model/continuing_subword_prefix", "<s>", "not a tokenizer that encodes texts: range end index"),
    ],
)
@pytest.mark.parametrize("load", [folder_tokenizer, Tokenizer.load], ids=["folder", "checkpoint"])
def test_parts_that_do_not_fit_together_are_refused(
    load: Callable[[Path], Tokenizer], which: int, path: str, value: Any, message: str, tmp_path: Path
) -> None:
    """Files that the library reads, and panics, fails or takes gigabytes over when they are used."""
    (tmp_path / "tokenizer.json").write_bytes(good := list(seeds.tokenizers())[which])
    assert load(tmp_path).encode("ab").tolist()
    tree = json.loads(good)
    above, last = at(tree, path)
    above[last] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{message}"):
        load(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_folders_template_is_found_wherever_it_is_kept(tmp_path: Path) -> None:
    Tokenizer(trained("gpt-2"), {"chat_template": "in the config", "eos_token": "<|im_end|>"}).save(tmp_path)
    assert chat_template(folder_tokenizer(tmp_path)) == "in the config"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "in a file of its own"}))
    assert chat_template(folder_tokenizer(tmp_path)) == "in the config"
    (tmp_path / "chat_template.jinja").write_text("as transformers 5 writes it")
    assert chat_template(folder_tokenizer(tmp_path)) == "as transformers 5 writes it"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    (tmp_path / "chat_template.jinja").unlink()
    got = folder_tokenizer(tmp_path)
    assert (chat_template(got), got.eos_id) == ("in a file of its own", 1)


def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json; --tokenizer names another folder"):
        folder_tokenizer(tmp_path)
    Tokenizer(trained("gpt-2")).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: not UTF-8 text"):
        folder_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        folder_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        folder_tokenizer(tmp_path)
