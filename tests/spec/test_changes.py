"""Dotted changes: what they set, what they leave, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.spec.load import apply_changes, change, dump, load_model, parse_override, validate
from assay.spec.model import ModelSpec

A = {"mixer": {"kind": "gqa", "heads": 4}, "ffn": {"kind": "gated", "width": 24}}
TWO = {
    "d_model": 32,
    "vocab": 11,
    "layers": 4,
    "context": 16,
    "blocks": {
        "a": A,
        "b": {"stages": [{"branches": [{"ffn": {"kind": "dense", "width": 8}}]} for _ in range(3)]},
    },
    "pattern": ["a", "b"],
}


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Leaves by dotted path, written apart from the code under test."""
    if isinstance(tree, dict) and tree:
        return {k: v for name, child in tree.items() for k, v in flat(child, f"{path}.{name}").items()}
    if isinstance(tree, list) and tree:
        return {k: v for i, child in enumerate(tree) for k, v in flat(child, f"{path}.{i}").items()}
    return {path[1:]: tree}


def differences(before: ModelSpec, after: ModelSpec) -> dict[str, Any]:
    a, b = flat(dump(before)), flat(dump(after))
    assert a.keys() == b.keys()
    return {k: b[k] for k in b if a[k] != b[k]}


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({"layers": 6}, {"layers": 6}),
        ({"model.layers": 6}, {"layers": 6}),
        ({"blocks.a.mixer.kv_heads": 2}, {"blocks.a.mixer.kv_heads": 2}),
        ({"blocks.b.stages.1.dropout": 0.5}, {"blocks.b.stages.1.dropout": 0.5}),
        ({"blocks.b.stages.*.dropout": 0.5}, {f"blocks.b.stages.{i}.dropout": 0.5 for i in range(3)}),
        ({"blocks.b.stages.2.branches.0.ffn.width": 9}, {"blocks.b.stages.2.branches.0.ffn.width": 9}),
        ({"init.std": 0.5, "vocab": 12}, {"init.std": 0.5, "vocab": 12}),
        ({"pattern.1": "a"}, {"pattern.1": "a"}),
    ],
)
def test_everything_else_stays(changes: dict[str, Any], moved: dict[str, Any]) -> None:
    spec = validate(ModelSpec, TWO, "here")
    assert differences(spec, change(spec, changes)) == moved
    assert differences(spec, validate(ModelSpec, TWO, "here")) == {}, "the spec itself was changed"


def test_star_is_every_block() -> None:
    spec = validate(ModelSpec, {**TWO, "blocks": {"a": A, "b": A}}, "here")
    told = differences(spec, change(spec, {"model.blocks.*.mixer.heads": 8}))
    assert told == {"blocks.a.mixer.heads": 8, "blocks.b.mixer.heads": 8}


def test_a_part_is_replaced_whole() -> None:
    spec = change(load_model("lab-64"), {"blocks.block.mixer": {"kind": "linear", "heads": 2}})
    assert spec.blocks["block"].mixer is not None and spec.blocks["block"].mixer.kind_name() == "linear"
    assert spec == load_model("lab-64", {"model.blocks.*.mixer": {"kind": "linear", "heads": 2}})


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("blocks.c.mixer.heads", 2, r"blocks\.c\.mixer\.heads: 'c' matches nothing; accepted here: a, b, \*"),
        ("layers.deep", 2, "'deep' matches nothing: what it stands in is 4, not a mapping"),
        ("encoder.layers", 2, "what it stands in is None"),
        ("blocks.b.stages.3.dropout", 0.1, r"'3' matches nothing; accepted here: 0, 1, 2, \*"),
        ("blocks.a.stages.0.dropout", 0.1, "'0' matches nothing; it is empty"),
        ("laers", 3, r"laers: unknown field \(did you mean 'layers'\?\)"),
        ("blocks.a.mixer.hads", 3, r"blocks\.a\.mixer\.hads: unknown field \(did you mean 'heads'\?\)"),
        ("blocks.a.mixer.heads", 3, r"blocks\.0\.mixer: d_model \(32\) is not a multiple of `heads` \(3\)"),
        ("d_model", float("nan"), "d_model: .*finite"),
    ],
)
def test_refused(path: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        change(validate(ModelSpec, TWO, "here"), {path: value})


@pytest.mark.parametrize("text", ["layers", "=3", "layers=", " = ", ""])
def test_an_override_is_path_and_value(text: str) -> None:
    with pytest.raises(ValueError, match=r"an override is path=value, such as model\.layers=4"):
        parse_override(text)


def test_override_values_are_yaml() -> None:
    values = ["4", "4e-3", "true", "null", "[1, 2]", "{kind: rope, theta: 100.0}", "a=b"]
    read = [parse_override(f" model.x ={v}") for v in values]
    assert [v for _, v in read] == [4, 0.004, True, None, [1, 2], {"kind": "rope", "theta": 100.0}, "a=b"]
    assert {path for path, _ in read} == {"model.x"}
    with pytest.raises(ValueError, match="override x: not valid YAML"):
        parse_override("x=[1")


trees = st.recursive(
    st.integers() | st.none(),
    lambda inner: (
        st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, min_size=1, max_size=3)
        | st.lists(inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
).filter(lambda tree: isinstance(tree, dict))


@given(tree=trees, data=st.data())
def test_any_leaf_is_set_alone(tree: dict[str, Any], data: st.DataObject) -> None:
    before = flat(tree)
    path = data.draw(st.sampled_from(sorted(before)))
    assert flat(apply_changes(tree, {path: "new"})) == {**before, path: "new"}
    assert flat(tree) == before
