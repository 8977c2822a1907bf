"""A bad file is refused with one message that names the field, the value and what is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from assay.spec.load import MAX_NODES, find, load_model, parse_yaml
from tests.spec.trees import MODEL, changed, refusal

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1", ["not valid YAML", "line 1"]),
        ("", ["empty", "mapping"]),
        ("# a comment", ["empty", "mapping"]),
        ("- 1", ["mapping is expected", "list"]),
        ("words", ["mapping is expected", "str"]),
        ("a: 1\n---\nb: 2", ["not valid YAML", "single document"]),
        (BOMB, ["aliases expand to", str(MAX_NODES)]),
        ("a: &a [*a]", ["alias contains itself"]),
        ("a: &a {b: *a}", ["alias contains itself"]),
        ("[" * 5000, ["nested too deeply"]),
        ("a" * 1_000_001, ["1000001 characters", "at most 1000000"]),
        (MODEL + "layers: 3\n", ["'layers' stands twice"]),
        (b"\xff\xfe\x00d: 1", ["not UTF-8"]),
        (b"d_model: \x00", ["not valid YAML", "#x0000"]),
        ("vocab: !!python/object/apply:os.system [ls]", ["not valid YAML", "could not determine a constructor"]),
    ],
)
def test_not_a_mapping(tmp_path: Path, text: str | bytes, says: list[str]) -> None:
    message = refusal(tmp_path, text)
    assert all(part in message for part in says), message


BLOCK = "    ffn: {kind: gated, width: 24}\n"
LIKE = BLOCK + "  c: {like: %s}\npattern: [%s]\n"
END = "positions: {p: {kind: rope}}\n"
ENCODER = "encoder: {d_model: 32, vocab: 3, layers: 1, context: 4, blocks: {e: {ffn: {kind: dense, width: 2}}}}\n"


FIELDS = [
    # Fields, types and ranges.
    ("layers: 2", "layer: 2", ["layer:", "unknown field", "did you mean 'layers'?", "accepted: d_model, vocab"]),
    ("position: p", "positon: p", ["blocks.b.mixer.positon:", "did you mean 'position'?"]),
    ("layers: 2", "layers: two", ["layers:", "valid integer", "'two'"]),
    ("layers: 2", "layers: 2.5", ["layers:", "valid integer", "2.5"]),
    ("layers: 2", "layers: true", ["layers:", "a number", "True"]),
    ("layers: 2", "layers: null", ["layers:", "valid integer", "None"]),
    ("layers: 2", "layers: 0", ["layers:", "greater than or equal to 1", "not 0"]),
    ("layers: 2\n", "", ["layers: missing"]),
    ("d_model: 32", "d_model: .nan", ["d_model:", "finite", "nan"]),
    ("width: 24", "width: .inf", ["blocks.b.ffn.width:", "finite", "inf"]),
    ("heads: 4", "heads: 4, scores: {scale: .nan}", ["blocks.b.mixer.scores.scale:", "finite"]),
    ("heads: 4", "heads: 4, sees: {window: 0}", ["blocks.b.mixer.sees.window:", "equal to 1, not 0"]),
    (END, END + "init: {std: -1}\n", ["init.std:", "at least 0, or 'fan_in'", "-1"]),
    (END, END + "init: {std: wide}\n", ["init.std:", "at least 0, or 'fan_in'", "'wide'"]),
    (END, "positions: [1, 2]\n", ["positions:", "dictionary", "[1, 2]"]),
    (END, "positions: {a.b: {kind: rope}}\n", ["positions.a.b", "pattern"]),
    # Parts.
    ("kind: gqa", "kind: gqq", ["blocks.b.mixer.kind:", "'gqq'", "did you mean 'gqa'?", "accepted: ", "cross", "gqa"]),
    ("kind: gqa, ", "", ["blocks.b.mixer.kind: missing", "accepted for mixers: ", "cross", "gqa"]),
    ("{kind: gqa, heads: 4, position: p}", "7", ["blocks.b.mixer:", "a mapping with a `kind`", "7"]),
    ("heads: 4", "heads: 4, kv_heads: 3", ["blocks.0.mixer:", "`heads` (4)", "`kv_heads` (3)"]),
    ("heads: 4", "heads: 5", ["blocks.0.mixer:", "d_model (32)", "`heads` (5)", "`head_dim`"]),
    (BLOCK, "    ffn: {kind: moe, width: 4, experts: 2, router: {kind: topk, k: 3}}\n", ["blocks.0.ffn:", "2"]),
    # Names of other things.
    ("position: p", "position: q", ["blocks.0.mixer.position:", "'q'", "accepted: p"]),
    (END, "", ["blocks.0.mixer.position:", "'p'", "none are declared"]),
    (END, END + "pattern: [b, c]\n", ["pattern:", "'c'", "accepted: b"]),
    (BLOCK, LIKE.replace("pattern: [%s]\n", "") % "blocks.0", ["pattern: missing", "b, c"]),
    (BLOCK, LIKE % ("blocks.0", "c, b"), ["blocks.c.like:", "'blocks.0'", "earlier layer"]),
    (BLOCK, LIKE % ("blocks.1", "b, c"), ["blocks.c.like:", "'blocks.1'", "earlier layer"]),
    (BLOCK, LIKE % ("b", "b, c"), ["blocks.c.like:", "'b'", "blocks.N"]),
    (BLOCK, LIKE % ("blocks.0, ffn: {kind: dense, width: 3}", "b, c"), ["blocks.c:", "`like` stands alone"]),
    (BLOCK, LIKE % ("blocks.0, scale: 2.0", "b, c"), ["blocks.c.scale:", "beside `like`"]),
    ("position: p", "position: p, takes: kv", ["blocks.0.mixer.takes:", "no earlier layer gives 'kv'"]),
    ("position: p", "position: p, takes: a, gives: b", ["blocks.0.mixer:", "not given again"]),
    # Forms of a block that exclude each other.
    (BLOCK, BLOCK + "    norm: {place: sideways}\n", ["blocks.b.norm.place:", "'pre', 'post'", "'sideways'"]),
    (BLOCK, BLOCK + "    parallel: shared\n    norm: {place: post}\n", ["blocks.b:", "'post'", "accepted: pre"]),
    (BLOCK, "    parallel: own\n", ["blocks.b:", "needs both `mixer` and `ffn`"]),
    (BLOCK, BLOCK + "    stages: [{branches: [{ffn: {kind: dense, width: 3}}]}]\n", ["blocks.b:", "or `stages`"]),
    (BLOCK, BLOCK + "    residual: none\n    norm: {place: post}\n", ["blocks.b:", "'none'", "add, post"]),
    (END, END + ENCODER, ["encoder.head:", "accepted: null"]),
]


@pytest.mark.parametrize(("old", "new", "says"), FIELDS)
def test_field(tmp_path: Path, old: str, new: str, says: list[str]) -> None:
    message = refusal(tmp_path, changed(old, new))
    assert all(part in message for part in says), message


STAGE = "d_model: 8\nvocab: 3\nlayers: 1\ncontext: 4\nblocks:\n  b:\n    stages: [{branches: [%s]}]\n%s"


@pytest.mark.parametrize(
    ("branch", "more", "says"),
    [
        ("{scale: 2.0}", "", ["blocks.b.stages.0.branches.0:", "exactly one of `mixer` and `ffn`"]),
        ("{ffn: {kind: dense, width: 3}}", "    dropout: 0.1\n", ["blocks.b.dropout:", "beside `stages`"]),
        ("{ffn: {kind: dense, width: 3}}", "    norm: {place: post}\n", ["blocks.b.norm:", "beside `stages`"]),
        ("{ffn: {kind: dense, width: 3}, name: a.b}", "", ["blocks.b.stages.0.branches.0.name:", "pattern"]),
    ],
)
def test_stages(tmp_path: Path, branch: str, more: str, says: list[str]) -> None:
    message = refusal(tmp_path, STAGE % (branch, more))
    assert all(part in message for part in says), message


SHARED = """\
d_model: 32
vocab: 11
layers: 2
context: 16
blocks:
  a: {mixer: {kind: gqa, heads: 4, gives: kv%s}}
  b: {mixer: {kind: gqa, heads: 4, takes: kv%s}}
pattern: [a, b]
"""


def test_what_is_taken_fits_what_is_given(tmp_path: Path) -> None:
    for giver, taker, says in (
        ("", ", kv_heads: 2", "2 key heads of 8: its giver has others"),
        ("", ", head_dim: 4", "4 key heads of 4: its giver has others"),
        (", sees: {window: 3}", "", "keeps only 3 tokens"),
        (", sees: {window: 3}", ", sees: {window: 4}", "keeps only 3 tokens"),
    ):
        message = refusal(tmp_path, SHARED % (giver, taker))
        assert message.startswith("blocks.1.mixer:") and says in message
    for giver, taker in (("", ""), (", sees: {window: 3}", ", sees: {window: 2}"), ("", ", sees: {window: 2}")):
        (tmp_path / "m.yaml").write_text(SHARED % (giver, taker))
        assert load_model(tmp_path / "m.yaml").layers == 2


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file.*did you mean 'gpt-11m'\?.*llama-11m"):
        find("gpt-11", "models")
    (tmp_path / "a.txt").write_text("d_model: 1")
    for path in (tmp_path / "a.txt", tmp_path):
        with pytest.raises(ValueError, match="not a YAML file or a checkpoint folder"):
            find(path, "models")


def test_numbers_as_people_write_them() -> None:
    """YAML 1.1 reads 4e-3 as text; the rest is PyYAML's own reading."""
    read = parse_yaml("[4e-3, 1E6, -2e+1, 4.0e-3, 1_0e2, e3, 4e, 0x10, '4e-3']", "here")
    assert read == [0.004, 1e6, -20.0, 0.004, 1000.0, "e3", "4e", 16, "4e-3"]


def test_merge_keys() -> None:
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", "here")["b"] == {"x": 1, "y": 3}
