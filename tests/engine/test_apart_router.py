"""Who gets a request, against counting by hand."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.engine.apart import router as routing
from assay.engine.apart.router import ClusterConfig, Router
from assay.engine.request import Request, Serving


def asked(prompt: range, new: int = 1, n: int = 1, tenant: str = "") -> Request:
    return Request(prompt=tuple(prompt), max_new=new, n=n, serving=Serving(tenant=tenant))


def test_round_robin_goes_round_and_leaves_out_who_is_lost() -> None:
    router = Router(ClusterConfig(route="round_robin", replicas=3), 4)
    assert [router.enter(asked(range(9))) for _ in range(5)] == [0, 1, 2, 0, 1]
    assert router.lose(1)
    assert [router.enter(asked(range(9))) for _ in range(3)] == [2, 0, 2]
    assert router.lose(0) and not router.lose(2)
    with pytest.raises(RuntimeError, match="no process is left"):
        router.enter(asked(range(9)))


def test_least_loaded_counts_prompts_and_replies() -> None:
    router = Router(ClusterConfig(route="least_loaded"), 4)
    assert router.enter(asked(range(30), 10)) == 0  # 40 tokens
    assert router.enter(asked(range(8), 5, n=3)) == 1  # 23
    assert router.enter(asked(range(9), 9)) == 1  # 41
    assert router.enter(asked(range(3), 1)) == 0  # 44
    router.did(0, 4)
    assert router.enter(asked(range(1))) == 0
    assert {worker: load.tokens for worker, load in router.loads.items()} == {0: 42, 1: 41}


@given(jobs=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), max_size=25), replicas=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_nobody_gets_more_while_another_has_less(jobs: list[tuple[int, int]], replicas: int) -> None:
    router, mine = Router(ClusterConfig(route="least_loaded", replicas=replicas), 4), Counter[int]()
    for prompt, new in jobs:
        chosen = router.enter(asked(range(prompt), new))
        assert mine[chosen] == min(mine[i] for i in range(replicas))
        mine[chosen] += prompt + new
        assert router.loads[chosen].tokens == mine[chosen]


def test_a_prompt_goes_where_its_beginning_is_unless_too_much_waits_there() -> None:
    router = Router(ClusterConfig(route="prefix"), 4)
    assert router.enter(asked(range(41))) == 0
    assert router.enter(asked(range(100, 141))) == 1
    for worker in (0, 1):
        router.did(worker, 42)
    assert router.enter(asked(range(100, 150))) == 1  # 40 of its tokens are known there
    assert router.loads[1].tokens == 51
    assert router.enter(asked(range(100, 113))) == 0  # 12 known against 51 that wait
    assert router.enter(asked(range(100, 150))) == 0  # 14 - 12 against 51 - 48
    assert router.enter(asked(range(41), tenant="another")) == 1  # nothing of it is known to that tenant: 65 against 51


def test_what_is_known_is_bounded_and_loses_ends_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "KNOWN", 6)
    router = Router(ClusterConfig(route="prefix", replicas=1), 4)
    router.enter(asked(range(17)))
    router.enter(asked(range(100, 117)))
    load = router.loads[0]
    names = router._names(asked(range(17)))
    assert len(load.known) == 6 and load.match(names) == 2 and load.match(router._names(asked(range(100, 117)))) == 4


def test_apart_reads_here_and_goes_on_there() -> None:
    router, request = Router(ClusterConfig(route="apart"), 4), asked(range(20), 8, n=2)
    assert router.config.roles == ("prefill", "decode")
    assert (router.enter(request), router.passes(request), router.passes(request)) == (0, 1, 1)
    assert {worker: load.tokens for worker, load in router.loads.items()} == {0: 22, 1: 14}
    assert not router.lose(1)


def test_several_read_and_several_go_on() -> None:
    """Whoever has least before it; one of each is enough to serve."""
    router = Router(ClusterConfig(route="apart", prefill=2, decode=3), 4)
    assert router.config.roles == ("prefill", "prefill", "decode", "decode", "decode") and router.config.speakers == 3
    assert [router.enter(asked(range(n), 9)) for n in (20, 5, 5, 5, 5, 5)] == [0, 1, 1, 1, 1, 0]
    assert [router.passes(asked(range(3), n)) for n in (30, 9, 4, 2)] == [2, 3, 4, 4]
    assert router.lose(3) and router.lose(0) and router.lose(2) and not router.lose(4)
