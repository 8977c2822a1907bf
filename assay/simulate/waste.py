"""How much of the memory set aside for state holds nothing, by the way it is set aside. No torch.

Over the steps in which a request's reply grows: step g of `new` holds prompt + g tokens. A share is summed over all
requests and steps, so a long reply counts for as long as it takes (Kwon et al. 2023, arXiv 2309.06180, figure 2).
"""

from __future__ import annotations

from dataclasses import dataclass

from assay.simulate.trace import Arrival, Trace

LONGEST, PAGES = (2048, 4096, 8192), (8, 16, 32, 128)


@dataclass(frozen=True)
class Waste:
    """waste: the share that holds nothing. fits: the share of requests that the way can serve; the others count not."""

    policy: str
    waste: float
    fits: float


def held(one: Arrival) -> int:
    """Tokens stored, summed over the steps of the reply."""
    return one.new * one.prompt + one.new * (one.new + 1) // 2


def paged(one: Arrival, page: int) -> int:
    """Tokens that whole pages have room for, summed over the steps: page * sum of ceil(n / page)."""

    def upto(n: int) -> int:  # sum of ceil(k / page) for k = 1..n
        full, rest = divmod(n, page)
        return page * full * (full + 1) // 2 + rest * (full + 1)

    return page * (upto(one.prompt + one.new) - upto(one.prompt))


def whole(one: Arrival) -> int:
    return one.prompt + one.new


def share(policy: str, trace: Trace, reserved: list[int], served: list[Arrival]) -> Waste:
    total = sum(reserved)
    waste = 1 - sum(map(held, served)) / total if total else 0.0
    return Waste(policy, waste, len(served) / len(trace))


def reserve_longest(trace: Trace, longest: int) -> Waste:
    """Room for the longest sequence that is accepted, for everybody."""
    served = [one for one in trace if whole(one) <= longest]
    return share(f"reserve {longest}", trace, [longest * one.new for one in served], served)


def buddy(trace: Trace) -> Waste:
    """The least power of two that holds the prompt and the reply, whose length is known ahead."""
    reserved = [(1 << (whole(one) - 1).bit_length()) * one.new for one in trace]
    return share("buddy", trace, reserved, list(trace))


def oracle(trace: Trace) -> Waste:
    """Exactly the prompt and the reply, whose length is known ahead: what is left is room not yet written."""
    return share("oracle", trace, [whole(one) * one.new for one in trace], list(trace))


def pages(trace: Trace, page: int) -> Waste:
    """Pages as they are needed: on average half a page of every sequence is empty."""
    return share(f"pages of {page}", trace, [paged(one, page) for one in trace], list(trace))


def wastes(trace: Trace) -> list[Waste]:
    return [
        *(reserve_longest(trace, longest) for longest in LONGEST),
        buddy(trace),
        oracle(trace),
        *(pages(trace, page) for page in PAGES),
    ]
