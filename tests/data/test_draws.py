"""Random integers: compared with plain-integer arithmetic, and pinned, because experiments depend on them."""

import hashlib

import numpy as np

from assay.data.draws import Draws, permutation, scatter

MASK = 2**64 - 1


def splitmix64(z: int) -> int:
    """The reference in unbounded integers (Vigna's splitmix64.c, without the increment)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_draws_are_sha256_of_key_and_counter() -> None:
    draws = Draws("mix", 7)
    found = [draws.bits() for _ in range(8)]
    blocks = [hashlib.sha256(b"('mix', 7)" + i.to_bytes(8, "little")).digest() for i in range(2)]
    words = [[int.from_bytes(b[i : i + 8], "little") for i in range(0, 32, 8)] for b in blocks]
    assert found == words[0][::-1] + words[1][::-1]


def test_scatter_is_splitmix64() -> None:
    values = [0, 1, 2, 2**63, MASK]
    offset = Draws("k").bits()
    expected = [splitmix64((value + offset) & MASK) for value in values]
    assert scatter(np.array(values, np.uint64), "k").tolist() == expected


def test_permutation_is_a_pinned_function_of_its_key() -> None:
    assert permutation(8, "golden", 0).tolist() == GOLDEN
    assert permutation(8, "golden", 1).tolist() != GOLDEN
    assert sorted(permutation(1000, 3).tolist()) == list(range(1000))


def test_every_item_reaches_every_place_about_equally_often() -> None:
    counts = np.zeros((5, 5))
    for seed in range(2000):
        counts[permutation(5, seed), np.arange(5)] += 1
    # 16 degrees of freedom: a fair shuffle exceeds 39.3 once in a thousand.
    assert ((counts - 400) ** 2 / 400).sum() < 39.3


GOLDEN = [6, 7, 3, 4, 0, 2, 1, 5]
