"""A checkpoint's tokenizer and chat template: from the files of a Hugging Face folder, or from a GGUF file's values.

A GGUF file holds a vocabulary and merges (or scores) and names the rest of the tokenizer; what the names stand for is
written down here. Source: src/llama-vocab.cpp of github.com/ggml-org/llama.cpp, and the models' own tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers as hf
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from assay.data.settings import read_settings
from assay.data.tokenizers import Tokenizer
from assay.data.tokenizers_trial import usable
from assay.hub.config import is_number

SPACE = "\u2581"
MAX_TEMPLATE = 1_000_000
MAX_PIECE = 512
"""Characters of a token in a vocabulary whose merges are found by cutting every token everywhere."""
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Our name of a special token -> the key `tokenizer.ggml.*_token_id`."""
ENDS = ("eos", "eot", "eom")

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), (GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact"), (r"\p{N}", GPT2)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (QWEN2,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "falcon3"), (LLAMA3,)),
    "tekken": (TEKKEN,),
}
"""`tokenizer.ggml.pre` -> how a text is cut into words before its bytes are merged, one cut after the other."""
WHOLE_FIRST = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"})
"""Where a word that is a token is that token, whatever its merges make of it."""
COMPOSED = frozenset({"qwen2"})
"""Where a text is brought into Unicode's form C first."""


def folder_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, its special tokens, and its template wherever that is kept.

    ValueError for a folder without tokenizer.json, and for files that are not what their names say.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder}: no tokenizer.json; --tokenizer names another folder, and transformers writes one: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    made = Tokenizer.load(folder)
    config = {**read_settings(folder / "special_tokens_map.json"), **read_settings(folder / "tokenizer_config.json")}
    older = read_settings(folder / "chat_template.json").get("chat_template")
    template = folder / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = _template(template)
    elif older is not None and "chat_template" not in config:
        config["chat_template"] = older
    return replace(made, config=config)


def _template(path: Path) -> str:
    if path.stat().st_size > MAX_TEMPLATE:
        raise ValueError(f"{path}: {path.stat().st_size} bytes; at most {MAX_TEMPLATE} are accepted")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None


def gguf_tokenizer(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer that a GGUF file's values describe, with its chat template.

    ValueError names the key that is missing, does not fit the others, or holds a kind of tokenizer nobody reads.
    """
    vocab = Vocabulary(metadata, where)
    kind = vocab.get("model", str)
    if kind == "gpt2":
        made = _byte_level(vocab)
    elif kind == "llama":
        made = _sentencepiece(vocab, str(metadata.get("general.architecture", "")).startswith("gemma"))
    else:
        raise vocab.wrong("model", "gpt2 (byte-level BPE) or llama (SentencePiece BPE)")
    for number, special in ((CONTROL, True), (USER_DEFINED, False)):
        # Gemma's runs of spaces are respelt, and found by their merges.
        added = [
            t for t, k in zip(vocab.tokens, vocab.types, strict=True) if k == number and made.token_to_id(t) is not None
        ]
        made.add_tokens([AddedToken(token, normalized=False, special=special) for token in added])
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    config |= {ours: token for ours, theirs in NAMES.items() if (token := vocab.special(theirs)) is not None}
    config["add_bos_token"] = vocab.get("add_bos_token", bool, kind == "llama")
    config["add_eos_token"] = vocab.get("add_eos_token", bool, False)
    if (template := metadata.get("tokenizer.chat_template")) is not None:
        if not isinstance(template, str):
            raise ValueError(f"{where}: tokenizer.chat_template: {template!r:.80}; a string is expected")
        config["chat_template"] = template
    if config["add_bos_token"] and "bos_token" in config:
        bos = config["bos_token"]
        made.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, made.token_to_id(bos))]
        )
    return usable(Tokenizer(made, config, vocab.ends()), where)


class Vocabulary:
    """The values under `tokenizer.ggml.`, each of the kind that is expected. `types` says which tokens are special."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata, self._where = metadata, where
        self.tokens: list[str] = self.listed("tokens", str)
        self.types: list[int] = self.listed("token_type", int) or [NORMAL] * len(self.tokens)
        if not self.tokens:
            raise self.wrong("tokens", "a list of strings")
        if len(self.types) != len(self.tokens):
            raise ValueError(f"{where}: tokenizer.ggml.token_type: {len(self.types)}; {len(self.tokens)} are expected")
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for i, token in enumerate(self.tokens) if self.ids[token] != i)
            raise ValueError(f"{where}: tokenizer.ggml.tokens: {twice!r:.80} stands twice")

    def wrong(self, key: str, wanted: str) -> ValueError:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        told = "missing" if value is None else f"{value!r:.80}"
        return ValueError(f"{self._where}: tokenizer.ggml.{key}: {told}; {wanted} is expected")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, kind):
            raise self.wrong(key, f"a value of type {kind.__name__}")
        return value

    def listed(self, key: str, kind: type) -> list[Any]:
        """A list of one kind of value; empty where there is none."""
        value = self._metadata.get(f"tokenizer.ggml.{key}", [])
        good = is_number if kind is float else lambda v: isinstance(v, kind)
        if not isinstance(value, list) or not all(good(v) for v in value):
            raise self.wrong(key, f"a list of {kind.__name__}")
        return value

    def special(self, name: str) -> str | None:
        """The token that the file gives a role."""
        found = self._metadata.get(f"tokenizer.ggml.{name}_token_id")
        if found is None:
            return None
        if not isinstance(found, int) or not 0 <= found < len(self.tokens):
            raise self.wrong(f"{name}_token_id", f"a token from 0 to {len(self.tokens) - 1}")
        return self.tokens[found]

    def ends(self) -> frozenset[int]:
        """What ends a reply: a text, a turn, or a message."""
        found = (self.special(name) for name in ENDS)
        return frozenset(self.ids[token] for token in found if token is not None)

    def merges(self) -> list[tuple[str, str]]:
        """Pairs in the order in which they are merged, as the file lists them."""
        pairs = []
        for line in self.listed("merges", str):
            at = line.find(" ", 1)
            pair = (line[:at], line[at + 1 :])
            if at < 0 or not {*pair, "".join(pair)} <= self.ids.keys():
                raise ValueError(
                    f"{self._where}: tokenizer.ggml.merges: {line!r:.80}: not two tokens that make a third"
                )
            pairs.append(pair)
        return pairs


def _byte_level(vocab: Vocabulary) -> hf.Tokenizer:
    name = vocab.get("pre", str)
    if name not in SPLITS:
        raise vocab.wrong("pre", f"one of {', '.join(sorted(SPLITS))}")
    model = models.BPE(vocab=vocab.ids, merges=vocab.merges(), ignore_merges=name in WHOLE_FIRST)
    made = hf.Tokenizer(model)
    if name in COMPOSED:
        made.normalizer = normalizers.NFC()
    cuts: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[name]]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last])
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(vocab: Vocabulary, gemma: bool) -> hf.Tokenizer:
    """Gemma's differs: its merges go by the order of the tokens, runs of spaces are spelt as such, and no space is put
    before a text."""
    ids = {SPACE * len(t) if gemma and t.strip(" ") == "" else t: i for t, i in vocab.ids.items()}
    if len(ids) != len(vocab.ids):
        raise vocab.wrong("tokens", f"a vocabulary without both spaces and {SPACE}")
    for name in NAMES.values():
        if (token := vocab.special(name)) is not None and token not in ids:
            raise vocab.wrong(f"{name}_token_id", "a token that is no run of spaces")
    merges = vocab.merges() or implied_merges(_ranks(vocab, ids, gemma))
    model = models.BPE(vocab=ids, merges=merges, unk_token=vocab.special("unknown"), fuse_unk=True, byte_fallback=True)
    made = hf.Tokenizer(model)
    prefix = not gemma and vocab.get("add_space_prefix", bool, True)
    made.normalizer = normalizers.Replace(" ", SPACE)
    ends: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        ends.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(ends)
    return made


def _ranks(vocab: Vocabulary, ids: Mapping[str, int], gemma: bool) -> dict[str, float]:
    """How early each ordinary token is made, the highest first."""
    scores = [-float(i) for i in range(len(ids))] if gemma else vocab.listed("scores", float)
    if len(scores) != len(ids):
        raise vocab.wrong("scores", f"{len(ids)} numbers, where no merges are given,")
    kinds = vocab.types
    return {token: scores[i] for token, i in ids.items() if kinds[i] in (NORMAL, USER_DEFINED)}


def implied_merges(ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece vocabulary: every way to cut a token into two others, best tokens first, and of one
    token's the longest left part first.

    SentencePiece merges the neighbours whose union scores highest; so does BPE with its merges in this order.
    """
    found: list[tuple[float, int, str, str]] = []
    for token, rank in ranks.items():
        if len(token) > MAX_PIECE:
            raise ValueError(f"tokenizer.ggml.tokens: a token of {len(token)} characters; at most {MAX_PIECE} are cut")
        cuts = ((token[:cut], token[cut:]) for cut in range(len(token) - 1, 0, -1))
        found += [(-rank, -len(left), left, right) for left, right in cuts if left in ranks and right in ranks]
    return [(left, right) for *_, left, right in sorted(found, key=lambda each: each[:2])]
