"""The metrics that find failing generations, on texts made by hand."""

from __future__ import annotations

import zlib

import pytest
import torch

from assay.measure import failures
from assay.measure.failures import Continuation, compressed_share, entropy_rise, invalid_share, longest_repeat
from tests.measure.subjects import spec, subject

PROSE = b"It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of"


def said(raw: bytes, entropy: tuple[float, ...] = (), within: int = 0) -> Continuation:
    return Continuation("", raw.decode("utf-8", "replace"), raw, tuple(raw), entropy, within)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"abcdefgh", 0),
        (b"abcabcabc", 6),
        (b"aaaa", 3),
        (b"abxab", 2),
        (b"xyzabcdqqabcdw", 4),
        (b"defghijkabcabcabcdefghijk", 8),
        (b"a", 0),
        (b"", 0),
    ],
)
def test_the_longest_n_gram_that_stands_twice(text: bytes, expected: int) -> None:
    assert longest_repeat(list(text)) == expected
    pairs = ((i, j, n) for n in range(1, len(text)) for i in range(len(text)) for j in range(i + 1, len(text) - n + 1))
    assert max((n for i, j, n in pairs if text[i : i + n] == text[j : j + n]), default=0) == expected


def test_loops_are_found_and_prose_is_not() -> None:
    loop = said(b"the the the the the the the the the the the the the the the the the the ")
    assert failures.repeated_share(loop) == pytest.approx((72 - 4) / 71)
    assert failures.repeated_share(said(PROSE)) == len(b"st of times, it was the ") / 95
    assert failures.repeated_share(said(b"aaaa")) is None
    assert compressed_share(loop) == len(zlib.compress(loop.raw, 9)) / 72 < 0.3 < (compressed_share(said(PROSE)) or 0)


def test_bytes_that_are_no_text() -> None:
    assert invalid_share(said(PROSE)) == 0
    assert invalid_share(said("naïve – café".encode())) == 0
    assert invalid_share(said("café".encode()[:-1])) == 0  # cut off inside its last character
    assert invalid_share(said(b"ab\xff\xfecd")) == pytest.approx(2 / 6)
    assert invalid_share(said(b"ab\xc3(cd")) == pytest.approx(1 / 6)
    assert invalid_share(said(b"")) is None


def test_uncertainty_past_the_training_length() -> None:
    assert entropy_rise(said(b"x" * 20, (1.0,) * 10 + (3.0,) * 10, 10)) == pytest.approx(2.0)
    assert entropy_rise(said(b"x" * 20, (1.0,) * 20, 18)) is None


def test_a_gallery_from_a_model_that_can_only_loop() -> None:
    """The embedding of every token but `a` is zero, and no block adds anything: the greedy answer is always `a`."""
    made = subject()
    with torch.no_grad():
        for parameter in made.model.blocks.parameters():
            parameter.zero_()
        table = made.model.embed.weight
        table.zero_()
        table[:, 0] = 0.01
        table[ord("a"), 0] = 5.0
    rows = failures.measure(made, prompts=["so it ", "and I "], new_tokens=80, temperatures=[0.0], keep=1)
    assert [row["metric"] for row in rows] == ["repeated_share", "compressed_share"]
    assert rows[0] == {
        "metric": "repeated_share",
        "score": 1.0,
        "prompt": "so it ",
        "text": "a" * 80,
        "why": failures.TESTS[0].why,
    }


def test_a_random_model_makes_no_text() -> None:
    """Draws over all bytes are mostly not UTF-8, and stop where the positions end."""
    made = subject(spec({"kind": "learned"}), dtype=torch.float32)
    with torch.no_grad():
        made.model.embed.weight.mul_(0.01)
    rows = failures.measure(made, prompts=3, temperatures=[1.0], keep=5)
    found = [row for row in rows if row["metric"] == "invalid_utf8_share"]
    assert len(found) == 3 and [row["score"] for row in found] == sorted((r["score"] for r in found), reverse=True)
    assert all(len(row["prompt"]) == 8 and len(row["text"]) <= 8 for row in found)
    assert failures.measure(made, prompts=["x" * 16]) == []
