"""A prefix in a whole model: between causal and bidirectional, decoded after, and refused where it would be cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from assay.cache import Cache, Size
from assay.engine.runner import check_continues
from assay.model.lm import LM, build, state_table
from assay.ops.step import prefixed, rows_step
from assay.spec.load import digest, validate
from assay.spec.model import ModelSpec
from tests.parts.small import close

IDS = torch.randint(0, 19, (2, 11), generator=torch.Generator().manual_seed(0))


def model(**sees: bool) -> LM:
    """Two layers in float64, with the same weights whatever they see."""
    mixer = {"kind": "gqa", "heads": 4, "kv_heads": 2, "position": "p", "sees": sees}
    tree = {
        "d_model": 16,
        "vocab": 19,
        "layers": 2,
        "context": 64,
        "positions": {"p": {"kind": "rope"}},
        "blocks": {"b": {"mixer": mixer, "ffn": {"kind": "gated", "width": 24}}},
        "init": {"std": "fan_in", "embed": 1.0, "depth": False},
    }
    return build(validate(ModelSpec, tree, "test"), seed=3).double().eval()


@torch.no_grad()
def logits(lm: LM, ids: Tensor, lengths: list[int] | None = None) -> Tensor:
    """[R, T, V] in one pass."""
    step = rows_step(ids)
    out = lm(step if lengths is None else prefixed(step, torch.tensor(lengths))).logits
    assert out is not None
    return out.view(*ids.shape, -1)


def test_the_ends_are_the_causal_and_the_bidirectional_model() -> None:
    lm, causal = model(prefix=True), logits(model(), IDS)
    for lengths in (None, [0, 0], [1, 1]):
        close(logits(lm, IDS, lengths), causal)
    close(logits(lm, IDS, [11, 11]), logits(model(causal=False), IDS))


def test_each_sequence_has_its_own_prefix() -> None:
    """The prefix alone is what a bidirectional model makes of it, and what follows depends on its length."""
    lm, both = model(prefix=True), model(causal=False)
    out = logits(lm, IDS, [4, 7])
    close(out[0, :4], logits(both, IDS[:1, :4])[0])
    close(out[1, :7], logits(both, IDS[1:, :7])[0])
    for row, length in enumerate((4, 7)):
        close(out[row], logits(lm, IDS[row : row + 1], [length])[0])
    assert float((out[0, 4:] - logits(lm, IDS, [5, 7])[0, 4:]).abs().max()) > 1e-3


@pytest.mark.parametrize("cuts", [[5, 1, 1, 1, 1, 1, 1], [6, 3, 2], [11]], ids=str)
@torch.no_grad()
def test_decoding_after_a_prefix_is_one_pass(cuts: list[int]) -> None:
    lm, lengths = model(prefix=True), torch.tensor([5, 3])
    store = Cache(state_table(lm.spec), Size(2, 11, max(cuts)), torch.float64)
    slots, pieces = [store.open(), store.open()], []
    for piece in IDS.split(cuts, 1):
        step = prefixed(rows_step(piece, store.length(slots[0]), horizon=64), lengths)
        out = lm(step, store.begin(slots, step)).logits
        assert out is not None
        pieces.append(out.view(*piece.shape, -1))
    close(torch.cat(pieces, 1), logits(lm, IDS, [5, 3]), 1e-10)


@pytest.mark.parametrize(
    ("lengths", "past", "said"),
    [
        ([5, 3], 0, "sequence 0 has a prefix of 5 tokens and brings 4 after 0"),
        ([3, 9], 4, "sequence 1 has a prefix of 9 tokens and brings 4 after 4"),
        ([3], 0, "1 lengths; the step has 2 sequences"),
    ],
)
def test_a_prefix_in_pieces_is_refused(lengths: list[int], past: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prefixed(rows_step(IDS[:, :4], past), torch.tensor(lengths))


def test_an_engine_that_cuts_prompts_refuses_it_and_other_digests_stay() -> None:
    with pytest.raises(ValueError, match="a prefix comes whole"):
        check_continues(model(prefix=True).spec)
    assert digest(model(prefix=False).spec) == digest(model().spec) != digest(model(prefix=True).spec)
