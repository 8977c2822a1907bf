"""Memory that holds nothing, against sums written out step by step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.simulate.generate import generate
from assay.simulate.trace import Arrival
from assay.simulate.waste import buddy, oracle, pages, reserve_longest, wastes

REQUESTS = st.lists(st.builds(Arrival, st.just(0.0), st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=8)


@given(REQUESTS, st.integers(1, 40))
def test_waste_is_that_of_a_walk_through_the_steps(trace: list[Arrival], page: int) -> None:
    used = paged = powers = exact = longest = 0
    for one in trace:
        for step in range(1, one.new + 1):
            used += one.prompt + step
            paged += math.ceil((one.prompt + step) / page) * page
            powers += 2 ** math.ceil(math.log2(one.prompt + one.new))
            exact += one.prompt + one.new
            longest += 200
    for found, reserved in (
        (pages(trace, page), paged),
        (buddy(trace), powers),
        (oracle(trace), exact),
        (reserve_longest(trace, 200), longest),
    ):
        assert found.waste == pytest.approx(1 - used / reserved) and found.fits == 1.0


def test_small_cases_in_closed_form() -> None:
    """A prompt of P and n new tokens: pages of one waste nothing, knowing the length wastes (n - 1) / 2 a step."""
    trace = [Arrival(0.0, 10, 4)]
    assert pages(trace, 1).waste == 0.0
    assert oracle(trace).waste == pytest.approx(1.5 / 14)
    assert pages(trace, 8).waste == pytest.approx(1 - (11 + 12 + 13 + 14) / (4 * 16))


def test_what_is_too_long_is_not_counted() -> None:
    trace = [Arrival(0.0, 10, 10), Arrival(0.0, 100, 10)]
    found = reserve_longest(trace, 50)
    assert found.fits == 0.5 and found.waste == pytest.approx(1 - 15.5 / 50)
    assert reserve_longest(trace, 5) == type(found)("reserve 5", 0.0, 0.0)


def test_a_page_wastes_half_of_itself() -> None:
    """Long sequences: (page - 1) / 2 of each, whatever their length."""
    trace = generate("conversation", 2000, 1.0, 0)
    steps = sum(one.new for one in trace)
    mean = sum((one.prompt + (one.new + 1) / 2) * one.new for one in trace) / steps
    for page in (8, 16, 32):
        assert pages(trace, page).waste == pytest.approx((page - 1) / 2 / mean, rel=0.03)


def test_the_order_of_the_policies() -> None:
    """Kwon et al. 2023, figure 2: reserving the longest, then a power of two, then the oracle, then pages."""
    found = {one.policy: one.waste for one in wastes(generate("conversation", 3000, 1.0, 0))}
    ranked = [
        found[name] for name in ("reserve 8192", "reserve 4096", "buddy", "oracle", "pages of 128", "pages of 16")
    ]
    assert ranked == sorted(ranked, reverse=True)
    assert found["reserve 4096"] > 0.6 and found["pages of 16"] < 0.04
