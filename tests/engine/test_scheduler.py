"""The scheduler against a room that counts pages, with random traffic: what must hold in every step, and at the end."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.engine.scheduler import Job, Plan, Scheduler, SchedulerConfig
from tests.engine.serving import Client, Pages, Server


@st.composite
def configs(draw: st.DrawFn, capacity: int, **fixed: Any) -> SchedulerConfig:
    budget, chunk = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    return SchedulerConfig(
        **{
            "policy": draw(st.sampled_from(["chunked", "eager", "prefill_first", "static"])),
            "budget": budget,
            "chunk": chunk,
            "border": draw(st.sampled_from([None, *range(1, min(budget, chunk, 4) + 1)])),
            "max_running": draw(st.sampled_from([1, 3, 8])),
            "capacity": capacity,
            "watermark": draw(st.sampled_from([0, 0, 1, 4])),
            "reserve": draw(st.sampled_from(["none", "none", "full"])),
            "preempt": draw(st.sampled_from(["recompute", "swap"])),
            "aging": draw(st.sampled_from([None, 0.5, 8.0])),
            "fairness": draw(st.sampled_from(["none", "none", "vtc"])),
            **fixed,
        }
    )


def traffic(seed: int, capacity: int, ends_early: bool = True) -> list[Client]:
    """Up to 14 jobs within a few seconds: more than memory holds, so that they stand in each other's way."""
    rng, clients = random.Random(seed), []
    for id in range(rng.randint(1, 14)):
        prompt = rng.randint(1, rng.choice([1, 4, capacity - 1]) if capacity > 4 else 1)
        max_new, arrival = rng.randint(1, capacity - prompt), rng.randint(0, 12)
        cancel, late = (rng.choice([None, None, rng.randint(arrival, arrival + 40)]) for _ in "ab")
        job = Job(id, prompt, max_new, arrival, rng.randint(-1, 2), rng.choice("abc"), late if ends_early else None)
        says = rng.choice([max_new, rng.randint(1, max_new)])
        clients.append(Client(job, says, cancel if ends_early else None, rng.choice([0, rng.randint(0, prompt - 1)])))
    return clients


@st.composite
def servers(draw: st.DrawFn, ends_early: bool = True, **fixed: Any) -> Server:
    seed = draw(st.integers(0, 1 << 32))
    rng = random.Random(seed)
    room = Pages(pages=rng.randint(2, 12), page=rng.randint(1, 4), rows=rng.choice([2, 8]), swaps=rng.random() < 0.7)
    capacity = room.pages * room.page
    return Server(room, draw(configs(capacity, **fixed)), traffic(seed, capacity, ends_early))


@settings(max_examples=100)
@given(servers() | servers(watermark=0, reserve="none", max_running=8))
def test_every_step_keeps_the_rules_and_every_job_ends_once(server: Server) -> None:
    for _ in server.run():
        pass
    assert server.ended.keys() == server.by_id.keys() and not server.room.held and not server.room.out
    for id, how in server.ended.items():
        assert (how == "done") == (server.said[id] == server.by_id[id].says)


@settings(max_examples=30)
@given(servers(reserve="full"))
def test_who_reserved_everything_is_never_preempted(server: Server) -> None:
    for plan in server.run():
        assert not plan.preempted


@settings(max_examples=30)
@given(servers(ends_early=False, policy="chunked", preempt="swap", watermark=0))
def test_what_was_swapped_is_not_computed_again(server: Server) -> None:
    server.room.swaps = True
    steps = list(server.run())
    tokens = sum(plan.tokens for plan in steps)
    free = [min(client.cached, client.job.prompt - 1) for client in server.clients]
    needed = sum(client.job.prompt + client.says - 1 for client in server.clients)
    assert needed - sum(free) <= tokens <= needed


def plans(config: SchedulerConfig, clients: list[Client], seed: int) -> list[Plan]:
    """The plans, with jobs of equal arrival told in another order."""
    mixed = random.Random(seed).sample(clients, len(clients))
    return list(Server(Pages(8, 2, rows=4), config, mixed).run())


@settings(max_examples=25)
@given(configs(16, fairness="none"), st.integers(0, 1 << 32))
def test_the_order_in_which_jobs_are_told_does_not_matter(config: SchedulerConfig, seed: int) -> None:
    clients = traffic(seed, 16)
    assert plans(config, clients, 0) == plans(config, clients, 1)


def served(config: dict[str, Any], jobs: list[Job], pages: int = 1000) -> list[Plan]:
    full = SchedulerConfig(**{"capacity": 1000, **config})
    return list(Server(Pages(pages, 1, rows=64), full, [Client(job, job.max_new) for job in jobs]).run())


def test_a_prompt_is_read_in_what_decodes_leave_of_the_budget() -> None:
    """By hand: job 0 reads 4 tokens and says the first of 5; job 1's 10 tokens then come in 7s and the rest."""
    steps = served({"budget": 8}, [Job(0, 4, 5, 0), Job(1, 10, 2, 1)])
    assert [(plan.decodes, plan.chunks) for plan in steps] == [
        ((), ((0, 4),)),
        ((0,), ((1, 7),)),
        ((0,), ((1, 3),)),
        ((0, 1), ()),
        ((0,), ()),
    ]


def test_a_step_that_no_reply_waits_for_takes_four_budgets() -> None:
    """By hand: 32 tokens at once of 40, and then what job 0's decodes leave of 8."""
    steps = served({"budget": 8, "policy": "eager"}, [Job(0, 20, 3, 0), Job(1, 20, 2, 0)])
    assert [(plan.decodes, plan.chunks) for plan in steps] == [
        ((), ((0, 20), (1, 12))),
        ((0,), ((1, 7),)),
        ((0,), ((1, 1),)),
        ((1,), ()),
    ]


def test_chunks_end_at_borders_and_the_rest_of_a_prompt_comes_alone() -> None:
    """By hand, borders every 4 tokens: 3 of 10 are stored; 6 a step reach 8, and then the end."""
    config = SchedulerConfig(capacity=20, budget=6, border=4)
    steps = Server(
        Pages(20, 1, rows=2), config, [Client(Job(0, 10, 2, 0), 2, cached=3), Client(Job(1, 2, 1, 0), 1)]
    ).run()
    assert [(plan.decodes, plan.chunks) for plan in steps] == [((), ((0, 5),)), ((), ((0, 2), (1, 2))), ((0,), ())]


def test_a_stored_beginning_may_end_between_borders() -> None:
    """By hand: 5 of 12 tokens are stored. The 1 token that is left of a step reaches no border, and waits."""
    config = SchedulerConfig(capacity=20, budget=4, border=4, chunk=4, policy="static")
    clients = [Client(Job(0, 3, 1, 0), 1), Client(Job(1, 12, 1, 0), 1, cached=5)]
    assert [plan.chunks for plan in Server(Pages(20, 1, rows=2), config, clients).run()] == [
        ((0, 3),),
        ((1, 3),),
        ((1, 4),),
    ]


def test_prompts_first_lets_decodes_wait() -> None:
    steps = served({"budget": 8, "policy": "prefill_first"}, [Job(0, 4, 5, 0), Job(1, 10, 2, 1)])
    assert [(plan.decodes, plan.chunks) for plan in steps] == [
        ((), ((0, 4),)),
        ((), ((1, 8),)),
        ((), ((1, 2),)),
        ((0, 1), ()),
        ((0,), ()),
        ((0,), ()),
        ((0,), ()),
    ]


def test_a_static_batch_lasts_as_long_as_its_longest_reply() -> None:
    jobs = [Job(id, 1, new, 0) for id, new in enumerate([5, 1, 2, 9, 3, 3])]
    static = served({"policy": "static", "max_running": 3}, jobs)
    assert len(static) == max(5, 1, 2) + max(9, 3, 3)
    # By hand: 3 enters where 1 ended, 4 where 2 did, 5 where 4 and 0 did; the longest, 3, runs steps 1 to 9.
    assert len(served({"max_running": 3}, jobs)) == 1 + 9


@pytest.mark.parametrize("aging", [0.0, 8.0, 32.0])
def test_an_urgent_stream_passes_a_waiting_job_for_its_priority_times_aging(aging: float) -> None:
    """One job of 2 steps arrives every second step, one place: job 0, three levels lower, waits 3 * aging seconds."""
    stream = [Job(id, 2, 1, 2.0 * (id - 1), priority=0) for id in range(1, 100)]
    late = Job(0, 2, 1, 0.0, priority=3)
    steps = served({"max_running": 1, "chunk": 1, "aging": aging}, [late, *stream])
    started = next(now for now, plan in enumerate(steps) if plan.chunks and plan.chunks[0][0] == 0)
    assert 0 <= started - 3 * aging <= 2


def test_without_aging_priority_alone_decides() -> None:
    stream = [Job(id, 2, 1, 2.0 * (id - 1)) for id in range(1, 50)]
    steps = served({"max_running": 1, "chunk": 1, "aging": None}, [Job(0, 2, 1, 0.0, priority=1), *stream])
    assert [id for plan in steps for id, _ in plan.chunks][-2:] == [0, 0]


def test_the_least_urgent_and_then_the_latest_makes_room() -> None:
    """Three jobs of up to 8 tokens in 16 pages of one: the least urgent leaves first, then the latest of the rest."""
    jobs = [Job(0, 4, 5, 0), Job(1, 4, 5, 0, priority=1), Job(2, 4, 5, 0), Job(3, 4, 5, 0)]
    steps = served({"capacity": 18, "watermark": 0}, jobs, pages=18)
    assert [plan.preempted for plan in steps if plan.preempted] == [(1,), (3,)]


def test_a_job_that_gave_way_goes_before_later_ones() -> None:
    jobs = [Job(id, 4, 5, id) for id in range(6)]
    server = Server(Pages(9, 1, rows=8), SchedulerConfig(capacity=9, watermark=0), [Client(j, 5) for j in jobs])
    order = [id for plan in server.run() for id, _ in plan.chunks]
    assert server.preemptions and order == sorted(order)


def test_an_urgent_prompt_is_read_before_one_that_was_begun() -> None:
    """Both run; 4 tokens a step. The urgent one enters beside the rest of the first chunk, and then takes it all."""
    steps = served({"budget": 4, "chunk": 3}, [Job(0, 9, 1, 0), Job(1, 7, 1, 0, priority=1)])
    assert [plan.chunks for plan in steps[:3]] == [((0, 3), (1, 1)), ((0, 3), (1, 1)), ((0, 3), (1, 1))]
    late = served({"budget": 4, "chunk": 3}, [Job(0, 9, 1, 0), Job(1, 7, 1, 1, priority=-1)])
    assert [plan.chunks for plan in late[:3]] == [((0, 3),), ((0, 3), (1, 1)), ((1, 3), (0, 1))]


def test_what_is_swapped_out_is_given_back_when_its_job_is_cancelled() -> None:
    room = Pages(8, 1, rows=2)
    config = SchedulerConfig(capacity=8, watermark=0, preempt="swap")
    run = Server(room, config, [Client(Job(0, 3, 5, 0), 5), Client(Job(1, 3, 5, 0), 5)])
    next(plan for plan in run.run() if plan.preempted)
    assert room.out == {1: 4}
    run.scheduler.cancel(1)
    assert not room.out and run.scheduler.running == (0,) and run.scheduler.waiting == 0


def test_a_cancel_while_the_step_runs() -> None:
    room = Pages(10, 1, rows=2)
    scheduler = Scheduler(room, SchedulerConfig(capacity=10))
    scheduler.add(Job(0, 3, 3, 0.0))
    scheduler.ran(scheduler.plan(0.0), {0: False})
    plan = scheduler.plan(1.0)
    assert scheduler.begun == 1
    scheduler.cancel(0)
    scheduler.cancel(0)
    assert not room.held and not scheduler.begun
    scheduler.ran(plan, {0: False})
    assert not scheduler.busy and not scheduler.begun and scheduler.plan(2.0) == Plan()


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job(0, 0, 1, 0.0), "prompt: expected at least 1 token, not 0"),
        (Job(0, 1, 0, 0.0), "max_new: expected at least 1 token, not 0"),
        (Job(0, 8, 3, 0.0), "a prompt of 8 tokens and 3 new ones are 11; there is room for 10"),
        (Job(7, 1, 1, 0.0), "id: job 7 has not ended yet"),
    ],
)
def test_a_job_that_cannot_run_is_refused(job: Job, message: str) -> None:
    scheduler = Scheduler(Pages(10, 1, rows=1), SchedulerConfig(capacity=10))
    scheduler.add(Job(7, 8, 2, 0.0))
    with pytest.raises(ValueError, match=message):
        scheduler.add(job)
    assert scheduler.waiting == 1


def test_a_chunk_must_reach_a_border() -> None:
    with pytest.raises(ValueError, match=r"chunk: a chunk must reach the next border, 16 tokens on.* not 8"):
        SchedulerConfig(capacity=64, border=16, chunk=8)


def test_who_reports_wrongly_is_told() -> None:
    scheduler = Scheduler(Pages(10, 1, rows=1), SchedulerConfig(capacity=10, chunk=2))
    scheduler.add(Job(0, 3, 1, 0.0))
    with pytest.raises(ValueError, match="said: job 0 has 1 tokens to read; it says one exactly at 0"):
        scheduler.ran(scheduler.plan(0.0), {0: False})
    with pytest.raises(ValueError, match="said: job 0 has 0 tokens to read"):
        scheduler.ran(scheduler.plan(0.0), {})


def test_a_room_that_holds_less_than_it_says_is_an_error_and_no_endless_loop() -> None:
    scheduler = Scheduler(Pages(5, 1, rows=1), SchedulerConfig(capacity=10))
    scheduler.add(Job(0, 3, 3, 0.0))
    with pytest.raises(RuntimeError, match="refuses job 0 of 6 tokens although it is alone"):
        scheduler.plan(0.0)


def test_the_best_one_goes_on_when_somebody_else_takes_memory() -> None:
    """Three prompts are half read when two thirds of the pages go: nothing decodes, and the best of them has room."""
    room = Pages(24, 1, rows=3)
    server = Server(
        room, SchedulerConfig(capacity=8, budget=12, chunk=4), [Client(Job(i, 7, 1, 0), 1) for i in range(3)]
    )
    steps = server.run()
    next(steps)
    room.pages = 8
    assert next(steps) == Plan(chunks=((0, 3),), preempted=(2, 1))
    assert [plan.chunks for plan in steps] == [((1, 4),), ((1, 3),), ((2, 4),), ((2, 3),)]


def test_it_runs_without_torch() -> None:
    code = "import sys, assay.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
