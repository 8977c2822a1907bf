"""Sugar against hand-written stages, and the layer plan."""

from __future__ import annotations

from typing import Any

import pytest

from assay.spec.load import canonical, digest, load_model, validate
from assay.spec.model import BlockSpec, ModelSpec, branch_names

MIXER, FFN = {"kind": "gqa", "heads": 4}, {"kind": "gated", "width": 24}
NORM = {"kind": "layernorm", "eps": 0.5}


def stages(**block: Any) -> list[Any]:
    """The stages of a block, as plain data of its non-default fields."""
    return canonical(BlockSpec.model_validate({"mixer": MIXER, "ffn": FFN, **block}).expand())


def two(**common: Any) -> list[Any]:
    """Two stages of one branch; `post_norm` stands in the residual, the rest in the branches."""
    residual = {"residual": common.pop("residual")} if "residual" in common else {}
    mixer, ffn = {"mixer": MIXER, **common, "name": "mixer"}, {"ffn": FFN, **common, "name": "ffn"}
    return [{"branches": [mixer], **residual}, {"branches": [ffn], **residual}]


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({}, two(pre={"kind": "rmsnorm"})),
        ({"norm": {"kind": NORM}}, two(pre=NORM)),
        ({"norm": {"place": "none"}}, two()),
        ({"norm": {"place": "output", "kind": NORM}}, two(post=NORM)),
        ({"norm": {"place": "sandwich", "kind": NORM}}, two(pre=NORM, post=NORM)),
        ({"norm": {"place": "post", "kind": NORM}}, two(residual={"kind": "post", "norm": NORM})),
        (
            {"norm": {"place": "post", "kind": NORM}, "residual": {"kind": "post", "deep": True}},
            two(residual={"kind": "post", "norm": NORM, "deep": True}),
        ),
        ({"residual": "none"}, two(pre={"kind": "rmsnorm"}, residual={"kind": "none"})),
        ({"scale": 0.5}, two(pre={"kind": "rmsnorm"}, scale=0.5)),
        ({"mixer": None}, two(pre={"kind": "rmsnorm"})[1:]),
        ({"ffn": None}, two(pre={"kind": "rmsnorm"})[:1]),
    ],
)
def test_places_of_the_norm(block: dict[str, Any], expected: list[Any]) -> None:
    assert stages(**block) == expected


def test_parallel_branches() -> None:
    rms = {"kind": "rmsnorm"}
    own = [{"mixer": MIXER, "pre": rms, "name": "mixer"}, {"ffn": FFN, "pre": rms, "name": "ffn"}]
    assert stages(parallel="own") == [{"branches": own}]
    bare = [{"mixer": MIXER, "name": "mixer"}, {"ffn": FFN, "name": "ffn"}]
    assert stages(parallel="shared", dropout=0.25) == [{"branches": bare, "pre": rms, "dropout": 0.25}]
    assert stages(parallel="shared", norm={"place": "none"}) == [{"branches": bare}]


def test_stages_are_taken_as_written() -> None:
    written = [
        {"branches": [{"mixer": MIXER, "scale": 0.5}, {"mixer": {"kind": "linear", "heads": 2}}], "pre": NORM},
        {"branches": [{"ffn": FFN, "post": NORM}], "residual": {"kind": "none"}},
        {"branches": [{"ffn": FFN}]},
    ]
    made = BlockSpec.model_validate({"stages": written}).expand()
    assert canonical(made) == written
    assert [branch_names(made, i) for i in range(3)] == [("mixer", "mixer2"), ("ffn",), ("ffn2",)]


def tiled(pattern: list[str], layers: int, **more: Any) -> ModelSpec:
    wide = {"mixer": MIXER, "ffn": {**FFN, "width": 48}}
    blocks = {"a": {"mixer": MIXER, "ffn": FFN}, "b": wide, **more}
    blocks = {name: block for name, block in blocks.items() if name in pattern}
    tree = {"d_model": 32, "vocab": 11, "layers": layers, "context": 16, "blocks": blocks, "pattern": pattern}
    return validate(ModelSpec, tree, "here")


def test_the_pattern_is_tiled_over_depth() -> None:
    spec = tiled(["a", "a", "b"], 7)
    assert spec.plan == ("a", "a", "b", "a", "a", "b", "a")
    widths = [stages[1].branches[0].ffn.width for stages in spec.expand()]  # type: ignore[union-attr]
    assert widths == [24, 24, 48, 24, 24, 48, 24]
    assert [site.name for site, _, _ in spec.branches(2)] == ["blocks.2.mixer", "blocks.2.ffn"]


def test_like_is_the_block_it_names() -> None:
    spec = tiled(["a", "b", "again", "b"], 8, again={"like": "blocks.1"})
    assert spec.sources == (0, 1, 1, 3, 4, 5, 1, 7)
    assert spec.expand()[2] == spec.expand()[6] == spec.expand()[1] != spec.expand()[0]
    assert spec.site(6).layer == 6 and spec.site(6).name == "blocks.6"
    with pytest.raises(ValueError, match=r"blocks\.again\.like: 'blocks\.2' is not an earlier layer of its own"):
        tiled(["a", "b", "again", "again"], 4, again={"like": "blocks.2"})


@pytest.mark.parametrize("name", ["gpt-11m", "llama-11m", "lab-64"])
def test_written_out_a_shipped_model_builds_the_same_parts(name: str) -> None:
    """The block as stages: another digest (it is another text), the same sites and the same parts."""
    spec = load_model(name)
    stages = [canonical(stage) for stage in spec.blocks["block"].expand()]
    long = validate(ModelSpec, {**canonical(spec), "blocks": {"block": {"stages": stages}}}, "long")
    assert [(s.name, p) for s, p in long.parts()] == [(s.name, p) for s, p in spec.parts()]
    assert digest(long) != digest(spec)
