"""How much the loss holds at once, and a batch that is one sequence a row."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from assay.parts.heads.lm import LossOptions
from assay.train import memory
from assay.train.evaluate import step_of
from tests.train.small import learner, recipe


@pytest.mark.parametrize(("free", "piece"), [(79 << 30, 1 << 30), (8 << 30, 1 << 27), (0, 1 << 22)])
def test_an_accelerator_holds_more_logits(free: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve bytes a logit within a quarter of what is free, as a power of two."""
    monkeypatch.setattr(memory, "available_bytes", lambda device: free)
    assert memory.loss_piece(torch.device("cuda")) == piece
    assert memory.loss_piece(torch.device("cpu")) == LossOptions().piece


def test_a_step_says_whether_its_rows_are_whole() -> None:
    """One running text, and documents shorter than a row."""
    whole = recipe(data__documents=1, data__document_bytes=4096, data__valid_one_in=0, evaluation__tokens=0)
    for how, expected in ((whole, True), (recipe(batch__length=32, data__document_bytes=8), False)):
        batch = next(learner(how=how).loader)
        assert batch.whole == step_of(batch).whole == expected
        assert bool((batch.seq == torch.arange(4).repeat_interleave(batch.grid[1])).all()) == expected


def test_what_was_counted_is_not_kept() -> None:
    """An output saved for backward refers to its graph: kept with it, neither would ever go."""
    layer, kept = torch.nn.Linear(4, 4), []
    with memory.SavedForBackward(layer) as found:  # type: ignore[arg-type]
        y = layer(torch.ones(3, 4)).exp()
        kept.append(StorageWeakRef(y.untyped_storage()))
    assert found.bytes >= 3 * 4 * 4 and not kept[0].expired()
    del y
    assert kept[0].expired()


def test_pieces_of_a_step_share_one_set_of_copies() -> None:
    """Pieces that are under way together, as in a pipeline, would keep one each. Gradients are the same to the bit."""
    how = recipe(batch__accumulate=4, precision="bfloat16")
    once, anew = learner(how=how), learner(how=how)
    with mock.patch.object(once.runner, "_cast", wraps=once.runner._cast) as cast:
        once.step(0, 8)
    with (
        mock.patch.object(anew.runner, "cast_once", nullcontext),
        mock.patch.object(anew.runner, "_cast", wraps=anew.runner._cast) as casts,
    ):
        anew.step(0, 8)
    assert (cast.call_count, casts.call_count) == (1, 4)
    for name, weight in once.model.named_parameters():
        assert torch.equal(weight, anew.team.parameters[name]), name
    for one in (once, anew):
        one.step(1, 8)
    assert all(torch.equal(w, anew.team.parameters[n]) for n, w in once.model.named_parameters())
