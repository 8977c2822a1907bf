"""Which page is free, referenced or kept for reuse. Counts and names only: no tensors, no torch, every call O(1)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class Blocks:
    """Pages of one store, numbered from 0.

    A page is free, or referenced by `refs` tables, or cached: nobody refers to it, but it has a name under which it can
    be found, until it is the one unused for longest when a page is wanted. A page with a name is never written.
    """

    def __init__(self, total: int) -> None:
        self.refs = [0] * total
        self.names: list[bytes | None] = [None] * total
        self.found: dict[bytes, int] = {}
        self.free: dict[int, None] = dict.fromkeys(range(total))  # in the order in which they became free
        self.cached: OrderedDict[int, None] = OrderedDict()  # unused for longest first
        self.evictions = 0

    @property
    def total(self) -> int:
        return len(self.refs)

    @property
    def available(self) -> int:
        """Pages that `take` can still give."""
        return len(self.free) + len(self.cached)

    def take(self, near: int | None = None) -> tuple[int, bool]:
        """A page with one reference, `near` itself if that is free, and whether it was evicted for this, so that its
        contents are somebody's. The caller has looked at `available`."""
        if self.free:
            page = near if near in self.free else next(iter(self.free))
            assert page is not None
            del self.free[page]
            self.refs[page] = 1
            return page, False
        page, _ = self.cached.popitem(last=False)
        self.rename(page)
        self.evictions += 1
        self.refs[page] = 1
        return page, True

    def share(self, page: int) -> None:
        """One reference more, to a page that is referenced or cached."""
        self.cached.pop(page, None)
        self.refs[page] += 1

    def drop(self, page: int) -> bool:
        """One reference less; whether the page is free now (and its contents nobody's)."""
        assert self.refs[page] > 0, f"page {page} is not referenced"
        self.refs[page] -= 1
        if self.refs[page]:
            return False
        if self.names[page] is not None:
            self.cached[page] = None
            return False
        self.free[page] = None
        return True

    def drop_all(self, pages: Iterable[int]) -> list[int]:
        """Those that are free now. Pages are given back last first, so that an ending is evicted before its start."""
        return [page for page in reversed(list(pages)) if self.drop(page)]

    def find(self, name: bytes) -> int | None:
        return self.found.get(name)

    def publish(self, page: int, name: bytes) -> int:
        """Name a referenced page; returns the page of that name: an equal one that was there before takes the
        reference over."""
        known = self.found.get(name)
        if known is None:
            self.rename(page)
            self.names[page] = name
            self.found[name] = page
        elif known != page:
            self.share(known)
            return known
        return page

    def rename(self, page: int) -> None:
        """Take the page's name away, so that nobody finds it."""
        name = self.names[page]
        if name is not None:
            del self.found[name]
            self.names[page] = None

    def check(self, references: Iterable[int]) -> None:
        """AssertionError unless these are all references there are, and free + cached + referenced is everything."""
        counts = [0] * self.total
        for page in references:
            counts[page] += 1
        assert counts == self.refs, "references and tables differ"
        used = sum(count > 0 for count in counts)
        assert len(self.free) + len(self.cached) + used == self.total, "pages are lost"
        assert not self.free.keys() & self.cached.keys(), "a page is both free and cached"
        assert all(not counts[page] for page in (*self.free, *self.cached)), "a free page is referenced"
        assert all(self.names[page] is None for page in self.free), "a free page has a name"
        assert {name: page for page, name in enumerate(self.names) if name is not None} == self.found, "names differ"
        assert all(self.names[page] is not None for page in self.cached), "a cached page has no name"
