"""Parity names what went wrong with RoPE: a scaling that was lost, how much of a head turns, and pairs beyond it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from assay.measure.rotary import scalings, sizes
from tests.measure.test_parity import Case, Defect, Weights, asked, case, field, spoiled

__all__ = ["case"]
LLAMA3 = "llama3 (factor 4, original 8, low_freq_factor 1, high_freq_factor 4)"


def read_for_half(weights: Weights) -> Weights:
    """Queries and keys whose neighbours in the file became halves as if four rows of eight were turned: the file has
    our rows in the order 0, 4, 1, 5, 2, 6, 3, 7."""
    order = torch.tensor([0, 1, 4, 5, 2, 6, 3, 7])
    names = [n for n in weights if ".mixer.q." in n or ".mixer.k." in n]
    return {n: torch.cat([head[order] for head in weights[n].split(8)]) for n in names}


DEFECTS = [
    Defect(
        "llama", 0, "mixer.q", f"positions.main.scaling is absent here; {LLAMA3} fits", {"positions.main.scaling": None}
    ),
    Defect(
        "llama",
        0,
        "mixer.q",
        f"positions.main.scaling is linear (factor 4) here; {LLAMA3} fits",
        {"positions.main.scaling": {"kind": "linear", "factor": 4.0}},
    ),
    Defect(
        "granite",
        0,
        "mixer.q",
        "positions.main.scaling is linear (factor 2) here; absent fits",
        {"positions.main.scaling": {"kind": "linear", "factor": 2.0}},
        file="mixer.q",
    ),
    field("llama", 0, "mixer.q", "positions.main.scaling.factor", 8.0, "8 here; 4"),
    field("gpt_neox", 0, "mixer.q", "positions.main.dim", 6, "6 here; 4", "mixer.q"),
    field("gpt_neox", 0, "mixer.q", "positions.main.dim", None, "absent here; 4", "mixer.q"),
    Defect(
        "cohere2",
        0,
        "mixer.q",
        "positions.main.dim is 4 here; absent fits, with the rows of queries and keys read for it",
        {"positions.main.dim": 4},
        read_for_half,
        "mixer.q",
    ),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("planted", DEFECTS, ids=[f"{d.family}-{d.cause}" for d in DEFECTS])
def test_a_planted_defect_is_found_and_named(case: Callable[[str], Case], planted: Defect) -> None:
    c = case(planted.family)
    bad = spoiled(c.got, planted.changes, planted.edit)
    for live, step in ((False, planted.file), (True, planted.live)):
        if step is not None:
            found = asked(c, bad, live)
            assert (found.layer, found.step, found.cause) == (planted.layer, step, planted.cause)


def test_scalings_are_spelt_by_the_numbers_that_stand_together() -> None:
    numbers = {"max_position_embeddings": 64.0, "rope_scaling.factor": 4.0, "rope_scaling.beta_fast": 16.0}
    found = list(scalings({**numbers, "other.factor": 2.0}))
    assert {"kind": "yarn", "factor": 4.0, "beta_fast": 16.0, "original": 64.0} in found
    assert {"kind": "linear", "factor": 2.0} in found and {"kind": "dynamic", "factor": 2.0, "original": 64.0} in found
    assert not list(scalings({"rope_theta": 1e4}))


def test_the_configurations_sizes_come_first() -> None:
    assert sizes(64, 64, {"rope_parameters.partial_rotary_factor": 0.3125})[0] == 20
    assert sizes(64, 64, {"rotary_dim": 12.0}) == [12, 56, 48, 40, 32, 24, 16, 8]
    assert sizes(8, 4, {"rotary_pct": 7.0}) == [8, 6, 2]
