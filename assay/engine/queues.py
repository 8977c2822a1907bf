"""Who is served next. Fairness between tenants by the virtual token counter (VTC): Sheng et al. 2024, "Fairness in
Serving Large Language Models", OSDI, arXiv 2401.00588, algorithm 2."""

from __future__ import annotations

from bisect import bisect_left, insort

Rank = tuple[float, float, int]  # smaller is sooner; the id comes last, so no two are equal


class Queue:
    """Waiting jobs: a lane a tenant, ordered by rank. Next is the first of the lane that has been served least.

    The counter of a tenant is the service it has had (`charge`). A tenant that comes back after it had nothing waiting
    is lifted to the least counter among those who wait (or, where nobody waits, to that of the last to leave): it may
    not save up credit while it asks for nothing. With one lane this is a plain priority queue.
    """

    def __init__(self) -> None:
        self._lanes: dict[str, list[Rank]] = {}
        self._served: dict[str, float] = {}
        self._left: str | None = None

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def push(self, tenant: str, rank: Rank) -> None:
        if tenant not in self._lanes:
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._level())
            self._lanes[tenant] = []
        insort(self._lanes[tenant], rank)

    def first(self) -> int | None:
        """The id of the job that is next; None: nobody waits."""
        if not self._lanes:
            return None
        lane = min(self._lanes, key=lambda tenant: (self._served[tenant], self._lanes[tenant][0]))
        return self._lanes[lane][0][-1]

    def remove(self, tenant: str, rank: Rank) -> None:
        lane = self._lanes[tenant]
        lane.pop(bisect_left(lane, rank))
        if not lane:
            del self._lanes[tenant]
            self._left = tenant

    def charge(self, tenant: str, service: float) -> None:
        self._served[tenant] += service

    def _level(self) -> float:
        if self._lanes:
            return min(self._served[tenant] for tenant in self._lanes)
        return 0.0 if self._left is None else self._served[self._left]
