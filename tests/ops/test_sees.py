"""Visibility: its pairs against counting the mask, `&` against the logical and, and the settings that mean nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from assay.ops.sees import Sees

maybe = st.none() | st.integers(1, 9)


@st.composite
def rules(draw: st.DrawFn) -> Sees:
    if draw(st.booleans()):
        window = draw(maybe)
        chunk = draw(maybe)
        first = draw(st.integers(0, 3)) if window is not None and chunk is None else 0
        alone = window is None and chunk is None
        return Sees(window=window, chunk=chunk, first=first, prefix=alone and draw(st.booleans()))
    band = draw(st.none() | st.tuples(st.integers(0, 5), st.integers(0, 5)))
    return Sees(causal=False, chunk=draw(maybe), band=band)


def mask(rule: Sees, new: int, past: int, prefix: int = 0) -> np.ndarray:
    """By the meaning of each field, one pair at a time."""
    table = np.zeros((new, past + new), dtype=bool)
    for row in range(new):
        q = past + row
        for k in range(past + new):
            near = rule.window is None or q - k < rule.window or k < rule.first
            same = rule.chunk is None or q // rule.chunk == k // rule.chunk
            inside = rule.band is None or -rule.band[1] <= q - k <= rule.band[0]
            both = rule.prefix and k < prefix and q < prefix
            table[row, k] = (k <= q or not rule.causal or both) and near and same and inside
    return table


@given(rules(), st.integers(1, 12), st.integers(0, 12), st.integers(0, 26))
def test_pairs_count_the_mask(rule: Sees, new: int, past: int, prefix: int) -> None:
    table = mask(rule, new, past, prefix)
    q, k = np.arange(past, past + new)[:, None], np.arange(past + new)
    assert (np.broadcast_to(rule.visible(q, k, np.full_like(q, prefix)), table.shape) == table).all()
    assert rule.pairs(new, past, prefix) == table.sum()


@given(rules(), rules(), st.integers(1, 12), st.integers(0, 12))
def test_and_is_the_logical_and(a: Sees, b: Sees, length: int, prefix: int) -> None:
    try:
        both = a & b
    except ValueError:
        assume(False)
    wanted = mask(a, length, 0, prefix) & mask(b, length, 0, prefix)
    assert (mask(both, length, 0, prefix) == wanted).all()


@given(rules(), st.integers(1, 20))
def test_what_is_not_kept_is_never_seen_again(rule: Sees, length: int) -> None:
    assume(rule.keep is not None and rule.causal)
    assert rule.keep is not None
    row = mask(rule, 1, length)[0]
    assert not row[: max(0, length + 1 - rule.keep)].any()


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"causal": False, "window": 3}, "band"),
        ({"band": (1, 1)}, "causal: false"),
        ({"first": 2}, "window"),
        ({"window": 0}, "window"),
        ({"window": 3, "first": 1, "chunk": 4}, "not combined"),
        ({"prefix": True, "window": 3}, "prefix.*not combined"),
        ({"prefix": True, "causal": False}, "prefix.*not combined"),
    ],
)
def test_settings_without_a_meaning_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sees(**fields)  # type: ignore[arg-type]
