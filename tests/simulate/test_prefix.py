"""The prefix cache against a brute-force one, and where routing sends a request."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.simulate.fleet import ROUTES, Fleet, Router
from assay.simulate.generate import Lengths, Sessions, generate, sessions
from assay.simulate.goodput import Slo, summary
from assay.simulate.prefix import Evict, PrefixCache, hit_rate, known_tokens
from assay.simulate.replica import Task
from assay.simulate.run import simulate
from assay.simulate.trace import Arrival
from tests.simulate.cases import fleet, machine

PROMPTS = st.lists(st.lists(st.integers(0, 9), max_size=6, unique=True), max_size=40)


def brute(prompts: list[list[int]], capacity: int, evict: str) -> list[int]:
    """Hits of each prompt, with a list of (block, uses, last use) that is searched whole every time."""
    kept: list[list[int]] = []
    found, clock = [], 0
    for blocks in prompts:
        hits = 0
        while hits < len(blocks) and any(one[0] == blocks[hits] for one in kept):
            hits += 1
        found.append(hits)
        for block in blocks[::-1]:
            clock += 1
            here = [one for one in kept if one[0] == block]
            if here:
                here[0][1:] = [here[0][1] + 1, clock]
                continue
            if capacity == 0:
                continue
            if len(kept) == capacity:
                order = (lambda one: one[2]) if evict == "lru" else (lambda one: (one[1], one[2]))
                kept.remove(min(kept, key=order))
            kept.append([block, 1, clock])
    return found


@settings(max_examples=60, deadline=None)
@given(PROMPTS, st.integers(0, 8), st.sampled_from(["lru", "lfu"]))
def test_hits_are_those_of_a_brute_force_cache(prompts: list[list[int]], capacity: int, evict: Evict) -> None:
    cache, hits = PrefixCache(capacity, evict), []
    for blocks in prompts:
        hits.append(cache.match(blocks))
        cache.use(blocks)
        assert len(cache.ranks) <= capacity
    assert hits == brute(prompts, capacity, evict)


def test_hit_rates_grow_with_the_cache_up_to_what_is_repeated() -> None:
    trace = generate("sessions", 300, 2.0, 0)
    rates = [hit_rate(trace, n, "lru") for n in (0, 30, 100, 300, None)]
    assert rates == sorted(rates) and rates[0] == 0.0
    seen: set[int] = set()
    repeated = 0
    for one in trace:
        repeated += sum(block in seen for block in one.blocks)
        seen |= set(one.blocks)
    assert rates[-1] == repeated / sum(len(one.blocks) for one in trace)
    assert hit_rate([Arrival(0.0, 5, 1)], None) == 0.0


def test_a_known_beginning_is_not_read_again_but_its_last_token_is() -> None:
    assert [known_tokens(n, 1024) for n in (0, 1, 2)] == [0, 512, 1023]
    trace = [Arrival(0.0, 1024, 2, (1, 2)), Arrival(5.0, 1024, 2, (1, 2)), Arrival(9.0, 1300, 2, (1, 2, 3))]
    run = simulate(trace, machine(), fleet(cache=10))
    assert run.replicas[0].total.prefill == 1024 + 1 + (1300 - 1024)
    assert run.replicas[0].hits == 1023 + 1024
    assert simulate(trace, machine(), fleet(cache=0)).replicas[0].total.prefill == 1024 + 1024 + 1300


def picks(trace: list[Arrival], busy: bool = True, **fields: object) -> list[int]:
    """Where each goes, none of them begun yet, or all over at once."""
    kind = Fleet.model_validate({"replicas": 3, "cache": 100, **fields})
    replicas = kind.front(machine())
    router = Router(kind, replicas)
    found = []
    for number, one in enumerate(trace):
        replica = router.pick(one)
        found.append(replicas.index(replica))
        if busy:
            replica.add(Task(number, one.prompt, one.new, one.blocks), one.at)
        assert replica.cache is not None
        replica.cache.use(one.blocks)
    return found


def test_each_route_goes_by_its_rule() -> None:
    same = [Arrival(float(i), 1024, 8, (1, 2)) for i in range(4)]
    assert picks(same, route="round_robin") == [0, 1, 2, 0]
    assert picks(same, route="least_loaded") == [0, 1, 2, 0]
    uneven = [Arrival(0.0, n, 8) for n in (2000, 100, 100, 100)]
    assert picks(uneven, route="least_loaded") == [0, 1, 2, 1]
    assert picks(same, busy=False, route="prefix") == [0, 0, 0, 0], "where it is known"
    assert picks(same, route="prefix") == [0, 1, 2, 0], "1031 tokens still to do are more than 1023 known ones"
    assert len(set(picks(same, route="hash"))) == 1


def test_consistent_hashing_spreads_and_moves_little() -> None:
    trace = [Arrival(0.0, 512, 1, (i,)) for i in range(600)]
    three, four = picks(trace, route="hash"), picks(trace, route="hash", replicas=4)
    assert min(three.count(i) for i in range(3)) > 100
    moved = [(a, b) for a, b in zip(three, four) if a != b]
    assert all(b == 3 for _, b in moved), "only to the new one"
    assert 0.1 < len(moved) / len(trace) < 0.45


def test_knowing_the_caches_finds_more_than_chance() -> None:
    trace = sessions(Sessions(reply=Lengths(median=5, mean=8)), 200, 6.0, 0)
    found = {
        route: summary(simulate(trace, machine(), fleet(replicas=4, cache=5000, route=route)), Slo())["hit_rate"]
        for route in ROUTES
    }
    alone = summary(simulate(trace, machine(), fleet(cache=5000)), Slo())["hit_rate"]
    assert found["round_robin"] < found["hash"] <= alone * 1.02
    assert found["round_robin"] + 0.1 < found["prefix"] <= alone * 1.02


def test_bad_fleets_are_refused() -> None:
    for fields in ({"prefill": 2}, {"cache": -1}, {"route": "nearest"}, {"page": 0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            Fleet.model_validate(fields)
    with pytest.raises(ValueError, match="evict: 'mru'; accepted: lru, lfu"):
        PrefixCache(3, "mru")  # type: ignore[arg-type]
