"""One part's memory during one step: reads and writes the stores, decides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from assay.cache.tables import Reads, Saving, Writing
from assay.ops.state import Rows
from assay.ops.step import Layout, Step, View
from assay.ops.tape import LIVE


@dataclass(frozen=True)
class Stored:
    """The `State` of a part with stored fields. Parts with equal `layout_key` see equal layouts in a step."""

    name: str
    pools: Mapping[str, Tensor] = field(metadata=LIVE)
    layout_key: tuple[str, int] | None
    seen: tuple[Reads, Layout] | None
    writing: Writing | None
    saving: Saving | None

    keeps = True

    def layout(self, step: Step) -> Layout:
        if self.seen is None:
            raise ValueError(f"{self.name} stores no token or memory field, so it has no layout")
        return self.seen[1]

    def append(self, step: Step, **new: Tensor) -> View:
        writing = self.writing
        if writing is None:
            raise ValueError(f"{self.name}: this step brings nothing to append to {', '.join(new)}")
        for name, value in new.items():
            pool = self.pools[name]
            value = writing.arrival.pick(value.detach()).to(pool.dtype)
            pool.flatten(0, 1).index_copy_(0, writing.place, value)
        return self._view(tuple(new), writing.cut, writing.layout)

    def view(self, step: Step) -> View:
        assert self.seen is not None
        if self.layout_key is None or self.layout_key[0] != "memory":
            raise ValueError(f"{self.name}: only memory fields are read without an append")
        return self._view(tuple(self.pools), *self.seen)

    def _view(self, names: tuple[str, ...], cut: Reads, layout: Layout) -> View:
        return View(cut.fields({name: self.pools[name] for name in names}), layout)

    def load(self, name: str, step: Step) -> Rows:
        assert self.saving is not None
        return Rows(self.pools[name], self.saving.start)

    def store(self, step: Step, **rows: Tensor) -> None:
        assert self.saving is not None
        for name, value in rows.items():
            pool, chosen = self.pools[name], self.saving.chosen
            kept = value.detach() if chosen is None else value.detach().index_select(0, chosen)
            pool.index_copy_(0, self.saving.place, kept.to(pool.dtype))
