"""Which stored state belongs to which beginning of a text: sequence fields at page borders, under the page's name."""

from __future__ import annotations

from collections import OrderedDict


class Snapshots:
    """Places for copies of sequence fields, all fields of all layers together; the one unused for longest goes first.

    A sequence that starts from a snapshot copies it, so that nobody refers to one for longer than a moment.
    """

    def __init__(self, first: int, count: int) -> None:
        """`count` places from `first` on."""
        self.count, self.first = count, first
        self.places: OrderedDict[bytes, int] = OrderedDict()
        self.evictions = 0

    def __contains__(self, name: bytes) -> bool:
        return name in self.places

    def find(self, name: bytes) -> int:
        """The place of a snapshot that is about to be used."""
        self.places.move_to_end(name)
        return self.places[name]

    def take(self, name: bytes) -> int | None:
        """A place to copy a state to; None where it is stored already, or where there is no place at all."""
        if name in self.places:
            self.places.move_to_end(name)
            return None
        if not self.count:
            return None
        if len(self.places) < self.count:
            place = self.first + len(self.places)
        else:
            _, place = self.places.popitem(last=False)
            self.evictions += 1
        self.places[name] = place
        return place

    def check(self) -> None:
        """AssertionError where two names share a place, or a place is not one of them."""
        used = sorted(self.places.values())
        assert len(used) == len(set(used)) <= self.count, "two snapshots share a place"
        assert all(self.first <= place < self.first + self.count for place in used), "a snapshot is out of its store"
