"""Pages without tensors: counts, names, who is evicted first."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.cache import prefix
from assay.cache.blocks import Blocks
from assay.cache.snapshots import Snapshots


def test_a_sequence_gets_consecutive_pages_where_it_can() -> None:
    blocks = Blocks(6)
    pages = [blocks.take()[0]]
    for _ in range(2):
        pages.append(blocks.take(pages[-1] + 1)[0])
    other = blocks.take()[0]
    assert pages == [0, 1, 2] and other == 3
    assert blocks.take(pages[-1] + 1) == (4, False), "page 3 is taken: any other"
    blocks.check([0, 1, 2, 3, 4])


def test_the_longest_unused_goes_first_and_leaves_before_their_stems() -> None:
    """Two texts of three pages with a common first page."""
    blocks = Blocks(5)
    first = [blocks.take()[0] for _ in range(3)]
    for page, name in zip(first, (b"a", b"ab", b"abc"), strict=True):
        blocks.publish(page, name)
    blocks.share(first[0])
    second = [first[0], *(blocks.take()[0] for _ in range(2))]
    for page, name in zip(second[1:], (b"ax", b"axy"), strict=True):
        blocks.publish(page, name)
    assert blocks.drop_all(first) == blocks.drop_all(second) == []
    assert (blocks.available, len(blocks.free)) == (5, 0)
    evicted = []
    for left in range(4, -1, -1):
        known = set(blocks.found)
        assert blocks.take()[1]
        evicted += list(known - set(blocks.found))
        assert blocks.available == left
    assert evicted == [b"abc", b"ab", b"axy", b"ax", b"a"]
    assert blocks.evictions == 5


def test_a_page_in_use_is_not_evicted_and_use_makes_young() -> None:
    blocks = Blocks(2)
    for name in (b"a", b"b"):
        page = blocks.take()[0]
        blocks.publish(page, name)
        blocks.drop(page)
    found = blocks.find(b"a")
    assert found is not None
    blocks.share(found)
    blocks.take()
    assert blocks.find(b"a") == found and blocks.find(b"b") is None and blocks.available == 0


def test_equal_pages_become_one() -> None:
    blocks = Blocks(3)
    a, b = blocks.take()[0], blocks.take()[0]
    assert blocks.publish(a, b"x") == a
    assert blocks.publish(b, b"x") == a
    assert blocks.drop(b), "the second copy is free"
    blocks.check([a, a])
    with pytest.raises(AssertionError, match="references and tables differ"):
        blocks.check([a])


@given(st.lists(st.integers(0, 2), max_size=9), st.integers(1, 4))
def test_names_say_the_whole_beginning(tokens: list[int], page: int) -> None:
    """Two pages share a name exactly if root, page size's cut and every token before them agree."""
    seen: dict[bytes, tuple[bytes, tuple[int, ...]]] = {}
    texts = [tokens, tokens[::-1], [0, *tokens], [*tokens, 1], [2 - t for t in tokens]]
    for text, key in product(texts, (b"", b"a", b"b")):
        made = list(prefix.names(prefix.root(key), text, page))
        assert len(made) == len(text) // page
        for number, name in enumerate(made, 1):
            content = key, tuple(text[: number * page])
            assert seen.setdefault(name, content) == content
    assert len(set(seen.values())) == len(seen)


def test_a_name_continues_where_it_was_left() -> None:
    root, tokens = prefix.root(b"k"), list(range(50_000, 50_023))
    whole = list(prefix.names(root, tokens, 4))
    text = prefix.Text(root)
    for count in (3, 9, 1, 10):
        text.tokens = tokens[: len(text.tokens) + count]
        text.settle(4)
    assert text.names == whole
    assert prefix.root(b"page") != prefix.name(b"", ()), "a key cannot pretend to be a page"


def test_snapshots_are_bounded_and_the_longest_unused_goes() -> None:
    kept = Snapshots(first=10, count=2)
    assert [kept.take(b"a"), kept.take(b"b"), kept.take(b"a")] == [10, 11, None]
    assert kept.take(b"c") == 11 and b"b" not in kept, "a was asked for after b"
    kept.find(b"a")
    assert kept.take(b"d") == 11 and kept.find(b"a") == 10 and kept.evictions == 2
    kept.check()
    assert Snapshots(0, 0).take(b"a") is None


def test_counting_pages_imports_no_torch() -> None:
    """The simulator counts pages with the same code. The package itself, which has the stores, is not imported."""
    program = """
import sys, types, pathlib, assay
package = types.ModuleType("assay.cache")
package.__path__ = [str(pathlib.Path(assay.__file__).parent / "cache")]
sys.modules["assay.cache"] = package
import assay.cache.blocks, assay.cache.prefix, assay.cache.snapshots, assay.cache.size
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
