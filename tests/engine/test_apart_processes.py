"""Engines in processes of their own say what one engine says, and end as they should."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from assay.cli.main import main
from assay.engine.apart.cluster import PATIENCE_S, Cluster
from assay.engine.apart.router import ClusterConfig, Role
from assay.engine.config import EngineConfig
from assay.engine.engine import Engine
from assay.engine.request import Grammar, Request, SamplingParams, Serving
from assay.engine.runner import Token
from assay.train.checkpoint import save_checkpoint
from tests.engine.apart import PAGES, TEXT, WILD, asked, engine, lm_of
from tests.server.live import tiny
from tests.server.live import words as spoken
from tests.server.test_process import SHORT, Process

KIND = "full-window-linear"
LONG = asked(20, 40, sampling=SamplingParams(temperature=0.0))


def cluster(config: EngineConfig = PAGES, **more: object) -> Cluster:
    made = partial(engine, KIND, config)
    return Cluster(made, lm_of(KIND).spec, TEXT, config, ClusterConfig(**more))  # type: ignore[arg-type]


def run(source: Cluster | Engine, requests: list[Request]) -> list[list[Token]]:
    """Each request's tokens, choice by choice; all asked for at once."""
    numbers = [source.submit(request) for request in requests]
    said: list[Token] = []
    until = time.monotonic() + 60
    while source.busy and time.monotonic() < until:
        said += source.step()
    return [sorted((t for t in said if t.request == number), key=lambda t: t.choice) for number in numbers]


def words(said: list[Token]) -> list[object]:
    return [(t.id, t.text, t.finish, t.choice, t.reused) for t in said]


def gone(pids: list[int], patience: float) -> bool:
    """Whether these processes end within so many seconds."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def alive(pid: int) -> bool:
    """Not a zombie, which has ended and only waits to be counted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def apart() -> Iterator[Cluster]:
    """Almost nothing may be under way between the two, so that the reader waits for the decoder all the time."""
    before = set(os.listdir("/dev/shm"))
    with cluster(route="apart", in_flight=1) as made:
        yield made
    assert set(os.listdir("/dev/shm")) <= before


def test_two_processes_say_what_one_engine_says(apart: Cluster) -> None:
    requests = [
        asked(),
        asked(30, 12, n=3, logprobs=1),
        asked(9, 1),
        asked(11, 6, grammar=Grammar(choice=("\x01\x02\x03\x04", "\x08\x01\x02\x03"))),
        asked(25, 20, sampling=SamplingParams(temperature=0.0), stop_tokens=frozenset({3, 4})),
    ]
    for request in requests:  # one by one, so that what a prompt finds stored is the same too
        (mine,), (its,) = run(apart, [request]), run(engine(KIND, PAGES), [request])
        assert words(mine) == words(its)
        assert mine[-1].finish in ("stop", "length")
    together = run(apart, requests)
    assert [[t.id for t in said] for said in together] == [[t.id for t in said] for said in run(engine(KIND), requests)]
    assert not apart.busy and all(load.tokens == 0 for load in apart.router.loads.values())
    assert apart.stats()["running"] == apart.stats()["pages_used"] == 0


def test_what_is_refused_is_refused_before_it_is_sent(apart: Cluster) -> None:
    far = Request(prompt=(99,), sampling=WILD)
    for bad, message in (
        (far, "ids 0 to 18"),
        (asked(60, 9), "up to 64"),
        (asked(grammar=Grammar(regex="a")), "gramm"),
    ):
        with pytest.raises(ValueError, match=message):
            apart.submit(bad)
    assert not apart.busy


def test_cancelled_and_late_ones_leave_nothing(apart: Cluster) -> None:
    late = apart.submit(LONG.model_copy(update={"serving": Serving(deadline_s=1e-4)}))
    numbers = [apart.submit(LONG) for _ in range(6)]
    said: list[Token] = []
    while not said:
        said = apart.step()
    for number in numbers[:-1]:
        apart.cancel(number)
    said += iter_all(apart)
    assert [t.finish for t in said if t.request == late][-1] == "deadline"
    assert sum(t.request == numbers[-1] for t in said) == 40 and said[-1].finish == "length"
    assert all(load.tokens == 0 for load in apart.router.loads.values())
    until = time.monotonic() + 5
    while apart.stats()["pages_used"] and time.monotonic() < until:
        apart.step()
    assert apart.stats()["pages_used"] == apart.stats()["running"] == apart.stats()["waiting"] == 0


def iter_all(source: Cluster) -> Iterator[Token]:
    until = time.monotonic() + 60
    while source.busy and time.monotonic() < until:
        yield from source.step()


def test_killing_the_decoder_ends_everything_by_name(apart: Cluster) -> None:
    """Last of this module's cluster."""
    pids = [seat.process.pid or 0 for seat in apart.seats]
    numbers = [apart.submit(LONG) for _ in range(3)]
    while not apart.step():
        pass
    os.kill(pids[1], signal.SIGKILL)
    began = time.monotonic()
    said = list(iter_all(apart))
    assert time.monotonic() - began < PATIENCE_S
    assert {t.request for t in said if t.finish == "error"} == set(numbers)
    assert apart.problem == f"the decode process 1 (pid {pids[1]}) has ended: killed by signal 9"
    assert gone(pids, PATIENCE_S)
    with pytest.raises(RuntimeError, match="decode process 1"):
        apart.submit(LONG)


@pytest.mark.slow
def test_of_two_replicas_one_may_be_killed() -> None:
    with cluster(route="round_robin") as made:
        requests = [asked(20 + i, 8, sampling=SamplingParams(seed=i)) for i in range(4)]
        alone = [[t.id for t in run(engine(KIND), [request])[0]] for request in requests]
        assert [[t.id for t in said] for said in run(made, requests)] == alone
        numbers = [made.submit(LONG) for _ in range(4)]
        while not made.step():
            pass
        victim = made.seats[0]
        os.kill(victim.process.pid or 0, signal.SIGKILL)
        said = list(iter_all(made))
        assert {t.request for t in said if t.finish == "error"} == set(numbers[::2])
        assert {t.request for t in said if t.finish == "length"} == set(numbers[1::2])
        assert victim.name in made.problem and not made.failed
        assert [t.id for t in run(made, requests[:1])[0]] == alone[0]


FRONT = """
import os, sys
from tests.engine.test_apart_processes import LONG, cluster
if __name__ == "__main__":
    made = cluster(route="apart")
    for _ in range(50):
        made.submit(LONG)
    while not made.step(): pass
    print(*(seat.process.pid for seat in made.seats), flush=True)
    while True: made.step()
"""


@pytest.mark.slow
def test_killing_the_front_ends_its_processes(tmp_path: Path) -> None:
    """Also the reader that is killed first ends all: with what was under way, and by name."""
    script, before = tmp_path / "front.py", set(os.listdir("/dev/shm"))
    script.write_text(FRONT)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment, text=True) as front:
        assert front.stdout is not None
        pids = [int(pid) for pid in front.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        front.kill()
    assert gone(pids, PATIENCE_S)
    assert set(os.listdir("/dev/shm")) <= before


@pytest.mark.slow
def test_killing_the_reader_ends_everything_by_name() -> None:
    with cluster(route="apart") as made:
        for _ in range(5):
            made.submit(LONG)
        while not made.step():
            pass
        pids = [seat.process.pid or 0 for seat in made.seats]
        os.kill(pids[0], signal.SIGKILL)
        said = list(iter_all(made))
        assert said[-1].finish == "error" and "prefill process 0" in made.problem and "signal 9" in made.problem
        assert gone(pids, PATIENCE_S)


@pytest.mark.slow
def test_of_two_readers_and_two_decoders_one_may_be_lost() -> None:
    """A decoder that hangs is noticed, named and killed; the others go on with what they have and what comes. Who reads
    takes other chunks than who goes on, and other numbers of sequences."""
    chunks = PAGES.model_copy(update={"chunk": 8, "budget": 8, "policy": "prefill_first"})
    makes: dict[Role, Callable[[], Engine]] = {
        "prefill": partial(engine, KIND, chunks),
        "decode": partial(engine, KIND, PAGES.model_copy(update={"max_running": 2})),
    }
    settings = ClusterConfig(route="apart", prefill=2, decode=2, silence_s=3.0, in_flight=1)
    with Cluster(makes, lm_of(KIND).spec, TEXT, PAGES, settings) as made:
        requests = [asked(20 + i, 8, sampling=SamplingParams(seed=i)) for i in range(5)]
        alone = [[t.id for t in run(engine(KIND), [request])[0]] for request in requests]
        assert [[t.id for t in said] for said in run(made, requests)] == alone
        numbers = [made.submit(LONG) for _ in range(4)]
        said = []
        while {owner for live in made.live.values() for owner, _ in live.owed.values()} != {2, 3}:
            said += made.step()
        hung = made.seats[2]
        theirs = {number for number, live in made.live.items() if live.owed[0][0] == 2}
        os.kill(hung.process.pid or 0, signal.SIGSTOP)
        began = time.monotonic()
        said += iter_all(made)
        assert time.monotonic() - began < 10
        assert theirs and {t.request for t in said if t.finish == "error"} == theirs
        assert {t.request for t in said if t.finish == "length"} == set(numbers) - theirs
        assert made.problem == f"{hung.name} has ended: not heard of for 3 s, and killed" and not made.failed
        assert [[t.id for t in said] for said in run(made, requests)] == alone
        assert not any(made._lent.values()) and all(load.tokens == 0 for load in made.router.loads.values())


def broken() -> Engine:
    raise ValueError("memory: 1 bytes; accepted: more")


@pytest.mark.slow
def test_what_the_processes_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="memory: 1 bytes"):
        Cluster(broken, lm_of(KIND).spec, TEXT, PAGES, ClusterConfig(replicas=1))
    makes: dict[Role, Callable[[], Engine]] = {
        "prefill": partial(engine, KIND),
        "decode": partial(engine, KIND, PAGES.model_copy(update={"page": 8})),
    }
    with pytest.raises(ValueError, match=r"decode process 1 .* cannot go on with what the prefill process 0"):
        Cluster(makes, lm_of(KIND).spec, TEXT, PAGES, ClusterConfig(route="apart"))
    with pytest.raises(ValueError, match="accepted: a page size"):
        cluster(PAGES.model_copy(update={"page": None}), route="prefix")


def children(pid: int) -> list[int]:
    """The processes that this one spawned to work."""
    found = [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]
    return [p for p in found if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]


@pytest.mark.slow
def test_the_server_over_two_processes(tmp_path: Path) -> None:
    """Says what it says alone; ends as it should; and is not well any more when a process is gone."""
    save_checkpoint(tmp_path / "tiny", tiny(), spoken())
    ask = {**SHORT, "prompt": "a longer prompt", "max_tokens": 12, "ignore_eos": True}
    answers = []
    ways = ("--prefill", "attention=sdpa", "--prefill", "chunk=5", "--decode", "attention=matmul")
    two = ("--apart", *ways, "--decode", "max_running=2")
    for options in ((), two, ("--replicas", "2", "--route", "prefix"), ways):
        served = Process(tmp_path / "tiny", tmp_path / "log", "--threads", "1", *options)
        body = served.client.post("/v1/completions", json=ask).json()
        answers.append(body["choices"][0])
        assert served.client.get("/health").status_code == 200
        pids = children(served.child.pid)
        assert len(pids) == (2 if {"--apart", "--replicas"} & set(options) else 0)
        if "--apart" in options:
            os.kill(pids[-1], signal.SIGKILL)
            assert served.client.post("/v1/completions", json=ask).status_code == 500
            assert served.client.get("/health").status_code == 503
            assert served.client.post("/v1/completions", json=ask).status_code == 503
            lost = [line["lost"] for line in served.lines() if line["event"] == "process"]
            assert lost == [f"the decode process 1 (pid {pids[-1]}) has ended: killed by signal 9"]
        served.end(signal.SIGTERM)
        assert served.status() == 0 and gone(pids, PATIENCE_S)
    assert answers[1:] == answers[:1] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--apart", "--replicas", "2"), "without --replicas"),
        (("--replicas", "2", "--route", "nearest"), "accepted: least_loaded, round_robin, prefix"),
        (("--split", "2p0d"), "--split '2p0d': accepted: how many read and how many go on, as in 1p2d"),
        (("--split", "1p2d", "--route", "prefix"), "accepted: without --replicas and --route"),
        (("--route", "prefix"), "--route: one process has nobody to choose among; accepted: with --replicas 2 or more"),
        (
            ("--cache-bytes", "1000"),
            "--cache-bytes: there is no folder that it could bound",
        ),
        (("--kv-dtype", "int3"), "accepted: bf16, int8, int4"),
        (("--decode", "chunk=8"), "--decode chunk: one process does both; accepted: attention; more with --apart"),
        (("--prefill", "kv_dtype=int8"), "accepted: attention, chunk, budget; more with --apart"),
        (("--prefill", "kv-dtype=int8", "--apart"), "accepted: on --decode, or --kv-dtype for both"),
        (("--decode", "kv_dtype=int8", "--apart", "--kv-dtype", "int8"), "accepted without --kv-dtype"),
        (("--decode", "kv_dtype=int3", "--apart"), "--decode: kv_dtype: "),
        (("--decode", "speed=9", "--apart"), "--decode: speed"),
        (("--prefill", "attention=fast"), "--prefill: attention: "),
        (("--prefill", "chunk"), "an override is path=value"),
    ],
)
def test_what_the_command_refuses(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tmp_path), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
