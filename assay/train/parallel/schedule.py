"""In which order a pipeline's stage runs its micro-batches forward and backward, and what an order costs. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["1f1b", "gpipe"]
KINDS: tuple[Kind, ...] = ("1f1b", "gpipe")


@dataclass(frozen=True)
class Task:
    """One micro-batch forward or backward through one stage."""

    micro: int
    back: bool = False


def order(kind: Kind, stage: int, stages: int, micro: int) -> list[Task]:
    """The tasks of a stage, first to last.

    gpipe: all forward, then all backward (Huang et al. 2018, arXiv 1811.06965). 1f1b: as many forward as there are
    stages behind this one, then one forward and one backward in turns, so that no more than `stages` micro-batches
    are held (PipeDream-Flush; Narayanan et al. 2021, arXiv 2104.04473, section 2.2). ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"schedule: {kind!r}; accepted: {', '.join(KINDS)}")
    ahead = micro if kind == "gpipe" else min(stages - stage - 1, micro)
    tasks = [Task(i) for i in range(ahead)]
    for i in range(micro - ahead):
        tasks += [Task(ahead + i), Task(i, True)]
    return tasks + [Task(i, True) for i in range(micro - ahead, micro)]


@dataclass(frozen=True)
class Run:
    """What a schedule costs. held: for each stage, the most micro-batches whose activations it keeps at once."""

    makespan: float
    bubble: float
    held: tuple[int, ...]


def simulate(orders: Sequence[Sequence[Task]], forward: float = 1.0, backward: float = 2.0) -> Run:
    """Equal stages that each do one thing at a time; a task begins when its stage is free and what it reads is there.
    ValueError where the orders wait for one another."""
    stages, ends = len(orders), dict[tuple[int, Task], float]()
    free, at = [0.0] * stages, [0] * stages
    while any(at[s] < len(orders[s]) for s in range(stages)):
        ready = [s for s in range(stages) if at[s] < len(orders[s]) and _source(s, orders[s][at[s]], stages) in ends]
        ready += [s for s in range(stages) if at[s] < len(orders[s]) and _source(s, orders[s][at[s]], stages) is None]
        if not ready:
            raise ValueError("the stages wait for one another: their orders are not those of one schedule")
        for s in ready:
            task = orders[s][at[s]]
            source = _source(s, task, stages)
            begin = max(free[s], 0.0 if source is None else ends[source])
            free[s] = ends[s, task] = begin + (backward if task.back else forward)
            at[s] += 1
    makespan = max(free)
    busy = sum(backward if task.back else forward for task in orders[0])
    return Run(makespan, 1 - busy / makespan, tuple(_held(tasks) for tasks in orders))


def _source(stage: int, task: Task, stages: int) -> tuple[int, Task] | None:
    """What a task waits for: the stage before, forward; the stage behind, backward; its own forward on the last."""
    if not task.back:
        return (stage - 1, task) if stage else None
    return (stage + 1, task) if stage + 1 < stages else (stage, Task(task.micro))


def _held(tasks: Sequence[Task]) -> int:
    now = most = 0
    for task in tasks:
        now += -1 if task.back else 1
        most = max(most, now)
    return most
