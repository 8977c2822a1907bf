"""Between pages in memory and tiers: what gets a name is put there, and beginnings are looked for there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from assay.cache.size import Kind
from assay.cache.tiers import Scope, Tiers
from assay.cache.tiers.record import Shapes

if TYPE_CHECKING:
    from assay.cache.paged import Paged

Record = dict[str, Tensor]


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}


class Backing:
    """Tiers behind one cache or several. model: the digest of its spec and its weights: records of another model are
    never found. fetched: pages that `open` had from a tier; snapshots: states."""

    def __init__(self, tiers: Tiers, model: str) -> None:
        self.tiers, self.model = tiers, model
        self.fetched = self.snapshots = 0

    def _name(self, cache: Paged, what: str, name: bytes) -> str:
        return Scope(self.model, cache.size.page, cache.format_key).name(what, name)

    def save_page(self, cache: Paged, kind: Kind, page: int, name: bytes) -> None:
        self.tiers.put(self._name(cache, f"page {kind[1]}", name), cache.page_tensors(kind, page))

    def save_state(self, cache: Paged, place: int, name: bytes) -> None:
        self.tiers.put(self._name(cache, "state", name), cache.state_tensors(place))

    def fetch(self, cache: Paged, names: Sequence[bytes], known: int) -> None:
        """Bring into memory what the longest beginning needs that is longer than the `known` first pages.

        Fields that stay visible need every page, so the first one missing bounds the length; below it, the longest at
        which windows and the state are to be had counts.
        """
        found: dict[tuple[str, bytes], Record | None] = {}
        most = len(names)
        for kind, group in cache.groups.items():
            if group.keep is None:
                missing = (i for i, name in enumerate(names[:most]) if not self._has(cache, found, kind, name))
                most = next(missing, most)
        for count in range(most, known, -1):
            ends = {kind: group.first(count * cache.size.page) for kind, group in cache.groups.items()}
            if self._state(cache, found, names[count - 1]) and all(
                self._has(cache, found, kind, name) for kind, first in ends.items() for name in names[first:count]
            ):
                self._enter(cache, found, ends, names[:count])
                return

    def _has(self, cache: Paged, found: dict[tuple[str, bytes], Record | None], kind: Kind, name: bytes) -> bool:
        if cache.groups[kind].blocks.find(name) is not None:
            return True
        key = (f"page {kind[1]}", name)
        if key not in found:
            like = cache.page_tensors(kind, 0)
            found[key] = self.tiers.get(self._name(cache, *key), _shapes(like))
        return found[key] is not None

    def _state(self, cache: Paged, found: dict[tuple[str, bytes], Record | None], name: bytes) -> bool:
        if cache.snapshots is None or name in cache.snapshots:
            return True
        if not cache.snapshots.count:
            return False
        key = ("state", name)
        if key not in found:
            like = cache.state_tensors(cache.snapshots.first)
            found[key] = self.tiers.get(self._name(cache, *key), _shapes(like))
        return found[key] is not None

    def _enter(
        self,
        cache: Paged,
        found: Mapping[tuple[str, bytes], Record | None],
        ends: Mapping[Kind, int],
        names: Sequence[bytes],
    ) -> None:
        """Into free or evicted pages, as far as there are any; what is there already is held meanwhile."""
        for kind, first in ends.items():
            blocks, held = cache.groups[kind].blocks, []
            for number, name in enumerate(names[first:], first):
                page = blocks.find(name)
                if page is not None:
                    blocks.share(page)
                elif blocks.available:
                    record = found[f"page {kind[1]}", name]
                    assert record is not None
                    page = cache.page_from(kind, number, record)
                    blocks.publish(page, name)
                    self.fetched += 1
                else:
                    break
                held.append(page)
            blocks.drop_all(held)
        state = found.get(("state", names[-1]))
        place = None if state is None or cache.snapshots is None else cache.snapshots.take(names[-1])
        if state is not None and place is not None:
            for field, tensor in cache.state_tensors(place).items():
                tensor.copy_(state[field])
            self.snapshots += 1
