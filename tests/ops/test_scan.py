"""The additive recurrence against its definition, token by token."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assay.ops.scan import additive
from assay.ops.step import rows_step, training_step


def drawn(tokens: int, sequences: int, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((tokens, 2, 3), (tokens, 2, 3), (tokens, 2, 4), (sequences, 2, 3, 4))
    return tuple(torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes)


def by_definition(q: Tensor, k: Tensor, v: Tensor, past: Tensor, seq: list[int]) -> tuple[Tensor, Tensor]:
    """S_i = S_{i-1} + k_i v_i^T in each sequence, o_i = q_i S_i; padding gives nothing."""
    state, rows = past.clone(), []
    for i, s in enumerate(seq):
        row = torch.zeros(2, 4, dtype=q.dtype)
        for h in range(2):
            if s >= 0:
                state[s, h] += torch.outer(k[i, h], v[i, h])
                row[h] = q[i, h] @ state[s, h]
        rows.append(row)
    return torch.stack(rows), state


@given(rows=st.integers(1, 3), length=st.integers(1, 7), seed=st.integers(0, 9))
def test_rows_with_a_past(rows: int, length: int, seed: int) -> None:
    """Prefill in rows and, at one token a row, the recurrence."""
    q, k, v, past = drawn(rows * length, rows, seed)
    step = rows_step(torch.zeros(rows, length, dtype=torch.long), 5)
    out, end = additive(q, k, v, past, step, True)
    expected, state = by_definition(q, k, v, past, step.seq.tolist())
    assert end is not None
    assert torch.allclose(out, expected, rtol=0, atol=1e-12) and torch.allclose(end, state, rtol=0, atol=1e-12)


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4), padding=st.integers(0, 3), seed=st.integers(0, 9))
def test_packed_documents(lengths: list[int], padding: int, seed: int) -> None:
    """Several sequences in one row, then padding; without a past the training form gives the same."""
    seq = [i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * padding
    index = [j for n in lengths for j in range(n)] + [0] * padding
    q, k, v, past = drawn(len(seq), len(lengths), seed)
    step = training_step(
        torch.zeros(len(seq), dtype=torch.long), torch.tensor(seq), torch.tensor(index), (1, len(seq)), 9
    )
    none_yet = torch.zeros(len(lengths), dtype=torch.long)
    step = step.with_(grid=None, past=none_yet, horizon=none_yet + 9)
    out, end = additive(q, k, v, past, step, True)
    expected, state = by_definition(q, k, v, past, seq)
    assert end is not None
    assert torch.allclose(out, expected, rtol=0, atol=1e-12) and torch.allclose(end, state, rtol=0, atol=1e-12)
    fresh, none = additive(q, k, v, torch.zeros(1, 2, 3, 4).double(), step.with_(grid=(1, len(seq))), False)
    assert none is None
    assert torch.allclose(fresh, by_definition(q, k, v, torch.zeros_like(past), seq)[0], rtol=0, atol=1e-12)


def test_half_precision_is_summed_in_the_states_dtype() -> None:
    """A thousand equal terms in bfloat16 stop growing at 256; the sum in float32 does not."""
    n = 1000
    one = torch.ones(n, 1, 1, dtype=torch.bfloat16)
    out, end = additive(one, one, one, torch.zeros(1, 1, 1, 1), rows_step(torch.zeros(1, n, dtype=torch.long)), True)
    assert end is not None and end.dtype == torch.float32 and out.dtype == torch.bfloat16
    assert float(end) == n and float(out[-1]) == 1000.0
