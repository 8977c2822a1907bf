"""The loss: whole or in pieces, smoothed, with a z-term; and a tied table."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assay.ops.step import rows_step
from assay.parts.heads.lm import LossOptions
from tests.model.small import VOCAB, ids, logits, loss, made

KINDS = [{"kind": "lm"}, {"kind": "lm", "tie": True}, {"kind": "lm", "bias": True, "softcap": 2.0, "scale": 0.5}]
STEP = rows_step(ids(20).view(2, 10))


def targets(seed: int = 1) -> Tensor:
    """Every fifth is left out."""
    made = ids(20, seed)
    made[::5] = -1
    return made


@pytest.mark.parametrize("head", KINDS)
@pytest.mark.parametrize("options", [{}, {"smoothing": 0.1}, {"z": 0.3}, {"smoothing": 0.2, "z": 0.01}])
def test_formulas(head: dict[str, object], options: dict[str, float]) -> None:
    """Smoothing mixes the target with the uniform distribution; z adds z * logsumexp^2; sums over real targets."""
    lm = made(head=head)
    t = targets()
    told = loss(lm, STEP, t, LossOptions(**options))
    z = logits(lm, STEP)[t >= 0]
    log_p, t = z - z.exp().sum(-1, keepdim=True).log(), t[t >= 0]
    nll = -log_p[torch.arange(len(t)), t].sum()
    share = options.get("smoothing", 0.0)
    expected = (
        (1 - share) * nll - share * log_p.mean(-1).sum() + options.get("z", 0.0) * z.exp().sum(-1).log().square().sum()
    )
    assert told["count"] == 16
    assert torch.allclose(told["nll"], nll, rtol=1e-12) and torch.allclose(told["objective"], expected, rtol=1e-12)


@pytest.mark.parametrize("head", KINDS)
@given(piece=st.integers(1, VOCAB * 20))
def test_pieces_are_the_whole(head: dict[str, object], piece: int) -> None:
    lm = made(head=head)
    results = []
    for size in (piece, 1 << 22):
        told = loss(lm, STEP, targets(), LossOptions(0.1, 0.2, size))
        grads = torch.autograd.grad(told["objective"], list(lm.parameters()))
        results.append([told["nll"], told["count"], told["objective"], *grads])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_pieces_hold_fewer_logits() -> None:
    """What is alive for the backward pass never includes all logits at once."""
    lm, alive = made(), {}
    for size in (VOCAB, 1 << 22):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            loss(lm, STEP, targets(), LossOptions(piece=size))
        alive[size] = sizes.count(20 * VOCAB)
    assert alive[VOCAB] == 0 and alive[1 << 22] >= 1


def test_in_bfloat16_the_loss_is_taken_in_float32() -> None:
    lm = made().bfloat16()
    told = loss(lm, STEP, targets())
    z = logits(lm, STEP).float()
    assert told["nll"].dtype == torch.float32
    assert torch.allclose(told["nll"], F.cross_entropy(z, targets(), ignore_index=-1, reduction="sum"))


def test_a_tied_table_is_one_tensor_with_both_gradients() -> None:
    tied, free = made(head=KINDS[1]), made(head=KINDS[0])
    assert not any(n.startswith("head.") for n, _ in tied.named_parameters())
    free.load_state_dict({**tied.state_dict(), "head.out.weight": tied.embed.weight})
    for lm in (tied, free):
        loss(lm, STEP, targets())["objective"].backward()
    both = free.get_parameter("embed.weight").grad + free.get_parameter("head.out.weight").grad  # type: ignore[operator]
    assert torch.allclose(tied.embed.weight.grad, both, rtol=0, atol=1e-12)
    assert tied.embed.table().data_ptr() == tied.embed.weight.data_ptr()
