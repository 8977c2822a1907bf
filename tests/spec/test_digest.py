"""One model has one digest however it is written; another model has another; and the shipped ones never move."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.spec.load import canonical, change, digest, dump, load_model, parse_yaml, to_yaml, validate
from assay.spec.model import ModelSpec
from tests.spec.trees import MODEL

BLOCK = {"kind": "gqa", "heads": 4, "position": "main"}
LAB = {
    "d_model": 64,
    "vocab": 256,
    "layers": 2,
    "context": 128,
    "positions": {"main": {"kind": "rope"}},
    "blocks": {"block": {"mixer": BLOCK, "ffn": {"kind": "gated", "width": 176}}},
    "head": {"kind": "lm", "tie": True},
}
LLAMA = {
    **LAB,
    "d_model": 384,
    "layers": 6,
    "context": 256,
    "positions": {"rope": {"kind": "rope"}},
    "blocks": {
        "block": {
            "mixer": {"kind": "gqa", "heads": 6, "kv_heads": 2, "position": "rope"},
            "ffn": {"kind": "gated", "width": 1184},
        }
    },
}
PLAIN = {"kind": "layernorm", "bias": False}
GPT = {
    **LLAMA,
    "positions": {"learned": {"kind": "learned"}},
    "blocks": {
        "block": {
            "mixer": {"kind": "gqa", "heads": 6, "position": "learned"},
            "ffn": {"kind": "dense", "width": 1536},
            "norm": {"kind": PLAIN},
        }
    },
    "final_norm": PLAIN,
    "init": {"embed": 0.02},
}


# A change here changes every stored result's digest: add a field with a default instead, which moves none.
@pytest.mark.parametrize(
    ("name", "tree", "expected"),
    [
        ("lab-64", LAB, "ec65809c9a872b5a"),
        ("llama-11m", LLAMA, "0f28b655e2b39a2f"),
        ("gpt-11m", GPT, "137819473bef17a5"),
    ],
)
def test_golden(name: str, tree: dict[str, Any], expected: str) -> None:
    spec = load_model(name)
    assert canonical(spec) == tree
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    assert digest(spec) == hashlib.sha256(text.encode()).hexdigest()[:16] == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("layers: 2", "layers: 0b10"),
        ("heads: 4", "heads: 4, kv_heads: null, sees: {causal: true}, scores: {softcap: null}"),
        ("width: 24", "act: silu, bias: false, width: 24"),
        ("{kind: rope}", "rope"),
        ("{kind: rope}", "{kind: rope, theta: 1e4}"),
        ("{kind: rope}", "{theta: 10000, kind: rope}"),
        ("vocab: 11", "vocab: 11\nfinal_norm: rmsnorm\nhead: {kind: lm, tie: false}\npattern: []"),
        ("vocab: 11", "vocab: 11\ninit: {std: 0.02}\nembed: {kind: token, scale: 1}"),
        ("  b:\n", "  b:\n    norm: {place: pre, kind: rmsnorm}\n    residual: {kind: add}\n"),
    ],
)
def test_two_spellings_of_one_model(old: str, new: str) -> None:
    a, b = (validate(ModelSpec, parse_yaml(text, "here"), "here") for text in (MODEL, MODEL.replace(old, new)))
    assert MODEL.count(old) == 1 and digest(a) == digest(b) and a == b


CHANGES: dict[str, Any] = {
    "d_model": 64,
    "vocab": 12,
    "layers": 3,
    "context": 32,
    "blocks.b.mixer.heads": 2,
    "blocks.b.mixer.kv_heads": 2,
    "blocks.b.mixer.head_dim": 4,
    "blocks.b.mixer.position": None,
    "blocks.b.mixer.sees.window": 4,
    "blocks.b.mixer.scores.softcap": 3.0,
    "blocks.b.mixer.qk_norm": {"norm": "rmsnorm"},
    "blocks.b.mixer.gate": "head",
    "blocks.b.mixer.bias": "qkv",
    "blocks.b.ffn.width": 25,
    "blocks.b.ffn.act": "gelu",
    "blocks.b.ffn": {"kind": "dense", "width": 24},
    "blocks.b.norm.place": "post",
    "blocks.b.norm.kind": "layernorm",
    "blocks.b.norm.kind.eps": 1e-5,
    "blocks.b.parallel": "own",
    "blocks.b.scale": 0.5,
    "blocks.b.dropout": 0.1,
    "blocks.b.residual": "none",
    "positions.p.theta": 500.0,
    "positions.q": "rope",
    "embed.scale": 2.0,
    "final_norm": None,
    "head": None,
    "head.tie": True,
    "init.std": "fan_in",
    "init.zero_out": True,
}


def test_every_changed_field_is_another_digest() -> None:
    spec = validate(ModelSpec, parse_yaml(MODEL, "here"), "here")
    digests = {path: digest(change(spec, {path: value})) for path, value in CHANGES.items()}
    digests[""] = digest(spec)
    assert len(set(digests.values())) == len(digests), digests


norms = st.sampled_from(["rmsnorm", "layernorm", {"kind": "rmsnorm", "eps": 1e-3, "weight": "plus_one"}])
mixers = st.one_of(
    st.fixed_dictionaries({"kind": st.just("linear"), "heads": st.sampled_from([2, 4])}),
    st.fixed_dictionaries(
        {"kind": st.just("gqa"), "heads": st.just(4)},
        optional={
            "kv_heads": st.sampled_from([1, 2, 4, None]),
            "head_dim": st.integers(1, 9),
            "position": st.sampled_from(["p", None]),
            "sees": st.sampled_from([{}, {"window": 3}, {"window": 3, "first": 1}, {"causal": False, "band": [1, 2]}]),
            "scores": st.fixed_dictionaries({}, optional={"scale": st.floats(0.1, 9), "sink": st.booleans()}),
            "qk_norm": st.fixed_dictionaries({"norm": norms, "over": st.sampled_from(["head", "full"])}),
        },
    ),
)
ffns = st.one_of(
    st.fixed_dictionaries({"kind": st.sampled_from(["dense", "gated"]), "width": st.integers(1, 99)}),
    st.fixed_dictionaries({"kind": st.just("moe"), "experts": st.integers(2, 5), "width": st.integers(1, 9)}),
)
blocks = st.fixed_dictionaries(
    {"mixer": mixers, "ffn": ffns},
    optional={
        "norm": st.fixed_dictionaries({"place": st.sampled_from(["pre", "post", "output", "sandwich", "none"])}),
        "parallel": st.sampled_from(["no", "own"]),
        "scale": st.floats(0.1, 2.0),
    },
)


@given(
    made=st.lists(blocks, min_size=1, max_size=3),
    layers=st.integers(1, 6),
    final=st.none() | norms,
    tie=st.booleans(),
    std=st.floats(0, 1) | st.just("fan_in"),
)
def test_any_model_goes_through_yaml(made: list[Any], layers: int, final: Any, tie: bool, std: Any) -> None:
    tree = {
        "d_model": 32,
        "vocab": 7,
        "layers": layers,
        "context": 9,
        "blocks": {f"b{i}": block for i, block in enumerate(made)},
        "pattern": [f"b{i}" for i in range(len(made))],
        "positions": {"p": {"kind": "alibi", "heads": 4}},
        "final_norm": final,
        "head": {"kind": "lm", "tie": tie},
        "init": {"std": std},
    }
    spec = validate(ModelSpec, tree, "here")
    for data in (dump(spec), canonical(spec), tree):
        again = validate(ModelSpec, parse_yaml(to_yaml(data), "yaml"), "yaml")
        assert again == spec and digest(again) == digest(spec)
    assert len(to_yaml(canonical(spec))) < len(to_yaml(dump(spec)))
