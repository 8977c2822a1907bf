"""Several replicas: which of them a request goes to, and a split into machines that read prompts and machines that
write replies. No torch."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from assay.engine.scheduler import SchedulerConfig
from assay.simulate.cost import Machine
from assay.simulate.prefix import Evict, PrefixCache, known_tokens
from assay.simulate.replica import Replica
from assay.simulate.trace import Arrival
from assay.spec.base import Spec

Route = Literal["round_robin", "least_loaded", "prefix", "hash"]
ROUTES: tuple[Route, ...] = ("round_robin", "least_loaded", "prefix", "hash")
POINTS, LEADING = 64, 4
ENDLESS = 1 << 40  # tokens


class Fleet(Spec):
    """replicas that do everything, or `prefill` and `decode` of them (Zhong et al. 2024, arXiv 2401.09670; Patel et al.
    2024, arXiv 2311.18677): a first kind reads prompts, and its state is sent to a second kind, which writes the rest.

    scheduler: of every replica; its capacity is the machine's. page: tokens of a page of state. cache: blocks of
    prompts that each replica keeps; 0 is none, null is all. route: round_robin; least_loaded, by tokens still to do;
    prefix, by those less the tokens of the prompt that the replica knows, of all caches as they are (Qin et al. 2025,
    arXiv 2407.00079, algorithm 1, in tokens where they estimate seconds); hash, consistent hashing (Karger et al. 1997)
    of the first blocks.
    """

    replicas: int = Field(default=1, ge=1)
    prefill: int = Field(default=0, ge=0)
    decode: int = Field(default=0, ge=0)
    scheduler: SchedulerConfig = SchedulerConfig(capacity=ENDLESS)
    page: int = Field(default=16, ge=1)
    cache: int | None = Field(default=0, ge=0)
    evict: Evict = "lru"
    route: Route = "least_loaded"

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.prefill > 0) != (self.decode > 0):
            raise ValueError(f"prefill {self.prefill}, decode {self.decode}; accepted: both above 0, or neither")
        return self

    @property
    def split(self) -> bool:
        return self.prefill > 0

    def front(self, machine: Machine) -> list[Replica]:
        """Those that requests arrive at."""
        return self._build(machine, self.prefill or self.replicas, self.scheduler, self.cache)

    def back(self, machine: Machine) -> list[Replica]:
        """Those that prompts are sent on to. Their prompts are one token long, which never waits for decodes to end."""
        return self._build(machine, self.decode, self.scheduler.model_copy(update={"policy": "chunked"}), 0)

    def _build(self, machine: Machine, count: int, config: SchedulerConfig, cache: int | None) -> list[Replica]:
        room = ENDLESS if machine.capacity is None else machine.capacity // self.page * self.page
        config = config.model_copy(update={"capacity": room})
        caches = [None if cache == 0 else PrefixCache(cache, self.evict) for _ in range(count)]
        return [Replica(machine, config, self.page, one) for one in caches]


class Router:
    """Chooses one of several replicas for each request."""

    def __init__(self, fleet: Fleet, replicas: Sequence[Replica]) -> None:
        self.fleet, self.replicas, self.turn = fleet, replicas, -1
        points = ((_point(f"{i}/{k}"), i) for i in range(len(replicas)) for k in range(POINTS))
        self.ring = sorted(points) if fleet.route == "hash" else []

    def pick(self, one: Arrival) -> Replica:
        return self.replicas[getattr(self, f"_{self.fleet.route}")(one)]

    def _round_robin(self, one: Arrival) -> int:
        self.turn = (self.turn + 1) % len(self.replicas)
        return self.turn

    def _least_loaded(self, one: Arrival) -> int:
        loads = [replica.load for replica in self.replicas]
        return loads.index(min(loads))

    def _prefix(self, one: Arrival) -> int:
        ahead = []
        for replica in self.replicas:
            found = replica.cache.match(one.blocks) if replica.cache is not None else 0
            ahead.append(replica.load - known_tokens(found, one.prompt))
        return ahead.index(min(ahead))

    def _hash(self, one: Arrival) -> int:
        """The replica of the next point on the ring; a prompt whose blocks are not known goes by its place in time."""
        key = one.blocks[:LEADING] or (one.at, one.prompt)
        place = bisect.bisect(self.ring, (_point(str(key)), -1))
        return self.ring[place % len(self.ring)][1]


def _point(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
