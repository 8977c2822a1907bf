"""Who gets a request: the one choice that all fronts make, by what they themselves have sent and heard. No torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from assay.cache import prefix
from assay.engine.request import Request
from assay.spec.base import Spec

Role = Literal["whole", "prefill", "decode"]
KNOWN = 1 << 16  # names of pages that a router remembers of each worker


class ClusterConfig(Spec):
    """Which processes there are, and how requests are shared among them.

    route: `apart` is `prefill` processes that read prompts and `decode` ones that go on with the replies, each given to
    whichever has fewest tokens before it. The others are over `replicas` that do everything: `round_robin`;
    `least_loaded`, by tokens still to be read or said; `prefix`, by those less the tokens of the prompt's longest
    beginning that the replica has been sent before (Qin et al. 2025, arXiv 2407.00079, algorithm 1, in tokens where
    they estimate seconds). in_flight: bytes of states on their way between two processes; one that is larger goes
    alone. start_s: seconds within which all must be ready. silence_s: a process that says nothing for so long hangs,
    and is killed; one that is well speaks every second, and after every step.
    """

    route: Literal["apart", "round_robin", "least_loaded", "prefix"] = "least_loaded"
    replicas: int = Field(default=2, ge=1)
    prefill: int = Field(default=1, ge=1)
    decode: int = Field(default=1, ge=1)
    in_flight: int = Field(default=1 << 28, ge=1)
    start_s: float = Field(default=120.0, gt=0.0)
    silence_s: float = Field(default=60.0, gt=1.0)

    @property
    def roles(self) -> tuple[Role, ...]:
        whole: Role = "whole"
        reads: Role = "prefill"
        goes_on: Role = "decode"
        apart = (reads,) * self.prefill + (goes_on,) * self.decode
        return apart if self.route == "apart" else (whole,) * self.replicas

    @property
    def speakers(self) -> int:
        """Processes that go on with replies."""
        return self.decode if self.route == "apart" else self.replicas


@dataclass
class Load:
    """What a worker has to do, in tokens, and the beginnings of prompts that it was sent, oldest first."""

    role: Role
    tokens: int = 0
    known: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def match(self, names: Sequence[bytes]) -> int:
        return next((i for i, name in enumerate(names) if name not in self.known), len(names))

    def learn(self, names: Sequence[bytes]) -> None:
        """A beginning's end is forgotten before it."""
        for name in reversed(names):
            self.known[name] = None
            self.known.move_to_end(name)
        while len(self.known) > KNOWN:
            self.known.popitem(last=False)


class Router:
    """`enter` says who reads a request, `passes` who goes on with one of its replies; `did` counts what is done.

    page: tokens of which beginnings of prompts are made, as in the workers. Workers are numbers. `lose` one, and
    nothing is sent to it any more. RuntimeError where nobody is left.
    """

    def __init__(self, config: ClusterConfig, page: int) -> None:
        self.config, self.page, self.turn = config, page, -1
        self.loads: dict[int, Load] = {i: Load(role) for i, role in enumerate(config.roles)}

    def enter(self, request: Request) -> int:
        """The worker that reads this prompt, and says what follows unless it passes that on."""
        names = self._names(request) if self.config.route == "prefix" else []
        worker = self._pick(self._of("prefill", "whole"), names)
        load = self.loads[worker]
        load.learn(names)
        load.tokens += len(request.prompt) + self.says(worker, request) * request.n
        return worker

    def says(self, worker: int, request: Request) -> int:
        """Tokens of a reply that such a worker says at most, before it passes the reply on."""
        return 1 if self.loads[worker].role == "prefill" else request.max_new

    def passes(self, request: Request) -> int:
        """The worker that goes on with a reply of which one token is said."""
        worker = self._pick(self._of("decode"), [])
        self.loads[worker].tokens += request.max_new - 1
        return worker

    def did(self, worker: int, tokens: int) -> None:
        """So many of a worker's tokens are read, said, or no longer wanted."""
        if worker in self.loads:
            self.loads[worker].tokens -= tokens

    def lose(self, worker: int) -> bool:
        """Whether requests can still be served."""
        self.loads.pop(worker, None)
        return {load.role for load in self.loads.values()} == set(self.config.roles)

    def _of(self, *roles: Role) -> list[int]:
        found = [worker for worker, load in self.loads.items() if load.role in roles]
        if not found:
            raise RuntimeError(f"no process is left that could {' or '.join(roles)}")
        return found

    def _pick(self, workers: Sequence[int], names: Sequence[bytes]) -> int:
        if self.config.route == "round_robin":
            later = [worker for worker in workers if worker > self.turn]
            self.turn = (later or workers)[0]
            return self.turn
        return min(workers, key=lambda i: (self.loads[i].tokens - self.page * self.loads[i].match(names), i))

    def _names(self, request: Request) -> list[bytes]:
        """Of the whole pages of a prompt; tenants do not share, nor do texts after different sources."""
        root = prefix.root(repr((request.serving.tenant, request.source)).encode())
        return list(prefix.names(root, request.prompt[:-1], self.page))
