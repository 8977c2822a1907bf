"""A tokenizer as llama.cpp's values: byte-level BPE, split by one of the rules that it has by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gguf import TokenType

from assay.data.tokenizers import Tokenizer
from assay.hub.tokenizer import SPLITS, WHOLE_FIRST

Values = dict[str, Any]

RULES: Mapping[tuple[str, ...], str] = MappingProxyType({cuts: name for name, cuts in reversed(SPLITS.items())})
"""How text is cut before merging -> llama.cpp's name of the rule, the first of several."""


def vocabulary(tokenizer: Tokenizer, size: int) -> Values:
    """The `tokenizer.*` values for a model with `size` ids. ValueError for what llama.cpp's BPE does not do."""
    tree = json.loads(tokenizer.hf.to_str())
    rule = splitter(tokenizer, tree)
    pieces = {i: piece for piece, i in tokenizer.hf.get_vocab().items()}
    tokens = [pieces.get(i, f"[PAD{i}]") for i in range(size)]
    found: Values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kind(tokenizer, i, i in pieces) for i in range(size)],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in tree["model"]["merges"]],
        "tokenizer.ggml.add_bos_token": adds(tokenizer, 0, tokenizer.bos_id),
        "tokenizer.ggml.add_eos_token": adds(tokenizer, -1, tokenizer.eos_id),
    }
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    found |= {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
    template = tokenizer.config.get("chat_template")
    return found | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


def splitter(tokenizer: Tokenizer, tree: Values) -> str:
    """The name of the rule by which text is split. ValueError names what is not known."""
    model, pre = tree["model"], tree["pre_tokenizer"] or {"type": "none"}
    if tokenizer.is_bytes or (model["type"] == "BPE" and not model["merges"]):
        raise ValueError(refusal("a byte tokenizer has no merges, and llama.cpp's BPE does not load without"))
    if model["type"] != "BPE" or model.get("byte_fallback") or "ByteLevel" not in json.dumps(pre):
        raise ValueError(refusal(f"{model['type']} with the pre-tokenizer {pre['type']}"))
    normalizer = (tree["normalizer"] or {"type": None})["type"]
    rule = by_steps(pre.get("pretokenizers", [pre]))
    if rule is None:
        raise ValueError(refusal(f"the pre-tokenizer {json.dumps(pre):.200}"))
    if normalizer is not None and (normalizer, rule) != ("NFC", "qwen2"):
        raise ValueError(refusal(f"the normalizer {normalizer}"))
    if bool(model.get("ignore_merges")) != (rule in WHOLE_FIRST):
        raise ValueError(refusal(f"ignore_merges {model.get('ignore_merges')} with the rule {rule}"))
    return rule


def by_steps(steps: list[Values]) -> str | None:
    """The rule of a list of pre-tokenizers that ends with ByteLevel."""
    *before, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    regex = last.get("use_regex", True)
    if not before:
        return "gpt-2" if regex else None
    first = before[0]
    if len(before) == 1 and first["type"] == "Digits" and first.get("individual_digits") and regex:
        return "smollm"
    if regex or any(s["type"] != "Split" or s["behavior"] != "Isolated" or s.get("invert") for s in before):
        return None
    return RULES.get(tuple(s["pattern"].get("Regex", "") for s in before))


def refusal(what: str) -> str:
    known = ", ".join(dict.fromkeys(RULES[cuts] for cuts in SPLITS.values()))
    return f"tokenizer: {what}; llama.cpp takes byte-level BPE with merges, split as by {known}"


def kind(tokenizer: Tokenizer, token: int, known: bool) -> int:
    added = tokenizer.hf.get_added_tokens_decoder().get(token)
    if added is not None:
        return int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
    return int(TokenType.NORMAL if known else TokenType.UNUSED)


def adds(tokenizer: Tokenizer, at: int, token: int | None) -> bool:
    """Whether a text gets this token at its beginning (0) or end (-1) when special tokens are asked for."""
    ids = tokenizer.hf.encode("", add_special_tokens=True).ids
    return token is not None and bool(ids) and ids[at] == token
