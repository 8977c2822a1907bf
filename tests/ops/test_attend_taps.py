"""What attention publishes, against the oracle: its log-sum-exp, and its probabilities, read out by identity values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch import Tensor

from assay.ops.attend import attend, attend_lse
from assay.ops.here import Here
from tests.ops.cases import Problem, problem, problems


def published(p: Problem, *globs: str) -> dict[str, Tensor]:
    taps: dict[str, Tensor] = {}
    here = Here("blocks.0.mixer", {}, {}, taps, frozenset(globs))
    attend(p.q, p.view, p.step, p.sees, p.scores, p.plan("auto"), here)
    return {name.removeprefix("blocks.0.mixer."): value for name, value in taps.items()}


@given(problems())
def test_what_is_published_is_the_oracles(p: Problem) -> None:
    taps = published(p, "blocks.*.scores", "*.probs")
    rows, entries, groups, _ = p.k.shape
    lines, width = (rows, entries) if p.layout.aligned else (1, rows * entries)
    identity = torch.eye(width, dtype=torch.float64)[None, :, None].expand(lines, width, groups, width)
    wide = replace(p, v=identity.reshape(rows, entries, groups, width))
    probs = attend(wide.q, wide.view, wide.step, wide.sees, wide.scores, wide.plan("oracle"))
    torch.testing.assert_close(taps["probs"], probs, atol=1e-12, rtol=1e-12)
    sink = taps["scores"].new_zeros(0) if p.scores.sink is None else p.scores.sink[None, :, None]
    logits = torch.cat([taps["scores"], sink.expand(len(p.q), -1, 1)], -1) if sink.numel() else taps["scores"]
    _, lse = attend_lse(p.q, p.view, p.step, p.sees, p.scores, p.plan("oracle"))
    torch.testing.assert_close(torch.logsumexp(logits, -1), lse, atol=1e-11, rtol=1e-11)
    # Between two visible keys the difference of logits is that of log-probabilities.
    seen = probs > 0
    offset = (taps["scores"] - probs.log()).masked_fill(~seen, 0.0)
    assert torch.equal(taps["scores"].isfinite(), seen)
    torch.testing.assert_close(offset, lse.where(seen.any(-1), 0.0)[..., None] * seen, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(
    "globs,names",
    [
        ((), set()),
        (("*",), set()),
        (("blocks.0.*", "*.mix"), set()),
        (("*.scores",), {"scores"}),
        (("blocks.0.mixer.probs", "blocks.1.mixer.scores"), {"probs"}),
        (("*", "*.mixer.scores", "*.mixer.probs"), {"scores", "probs"}),
    ],
)
def test_only_who_names_a_square_gets_it(globs: tuple[str, ...], names: set[str]) -> None:
    assert published(problem(), *globs).keys() == names


def test_listening_changes_no_bit_and_draws_nothing() -> None:
    p = problem(tokens=300, dropout=0.3)
    torch.manual_seed(2)
    alone = p.run("auto")
    torch.manual_seed(2)
    here = Here("m", {}, {}, {}, frozenset(["*.scores", "*.probs"]))
    heard = attend(p.q, p.view, p.step, p.sees, p.scores, p.plan("auto"), here)
    assert torch.equal(alone, heard)
    whole = published(replace(p, scores=replace(p.scores, dropout=0.0)), "*.probs")["probs"]
    assert torch.equal(here.taps["m.probs"], whole)
