"""Best-fit packing against its definition, and blends against counting; both resume."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.data.corpora import CorpusSpec
from assay.data.dataset import Dataset, open_dataset
from assay.data.loader import Loader
from assay.data.packing import BLOCK, BestFit, Blend, Epochs, Rows, packed, pieces
from assay.data.shards import Shard
from assay.data.tokenizers import Tokenizer, TokenizerSpec
from assay.data.vocabularies import from_bytes

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def shard(lengths: list[int]) -> Shard:
    """Every token is told apart by its document and place."""
    return Shard.of([[1000 * i + j for j in range(length)] for i, length in enumerate(lengths)], [1] * 50_000)


def naive(sizes: list[int], room: int) -> list[list[int]]:
    """Best-fit decreasing, as the paper says it: look at every bin."""
    bins: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        fits = [b for b in bins if room - sum(b) >= size]
        if fits:
            min(fits, key=lambda b: room - sum(b)).append(size)
        else:
            bins.append([size])
    return bins


@given(lengths=LENGTHS, room=st.integers(2, 20))
def test_bins_are_those_of_the_naive_algorithm(lengths: list[int], room: int) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    given_pieces = pieces(offsets, room - 1)
    mine = packed(given_pieces, room)
    assert sorted(piece for row in mine for piece in row) == sorted(given_pieces)
    sizes = [[stop - start for start, stop in row] for row in mine]
    assert Counter(map(sum, sizes)) == Counter(map(sum, naive([b - a for a, b in given_pieces], room)))


@given(lengths=LENGTHS, length=st.integers(2, 12))
def test_an_epoch_has_every_target_once_and_cuts_only_what_is_too_long(lengths: list[int], length: int) -> None:
    documents = shard(lengths)
    if max(lengths) < 2:
        with pytest.raises(ValueError, match="no document has two tokens"):
            BestFit(documents, length, 0)
        return
    made = BestFit(documents, length, seed=3)
    pairs: Counter[tuple[int, int]] = Counter()
    for number in range(made.rows):
        row = made.row(number)
        assert row.tokens.shape == (1, length + 1)
        follows = row.counted[0, 1:] & ~row.opens[0, 1:]
        pairs.update(zip(row.tokens[0, :-1][follows].tolist(), row.tokens[0, 1:][follows].tolist(), strict=True))
        starts = np.flatnonzero(row.opens[0] & row.counted[0])
        for token in row.tokens[0, starts].tolist():
            assert token % 1000 == 0 or lengths[token // 1000] > length + 1
    expected = Counter((1000 * i + j, 1000 * i + j + 1) for i, n in enumerate(lengths) for j in range(n - 1))
    assert pairs == expected


def test_validation_of_whole_documents_begins_no_sequence_inside_one() -> None:
    """Every target of the documents that were not cut, and nothing else of them."""
    valid, length = shard([9, 30, 7, 16, 5, 12]), 16
    data = Dataset(valid, valid, Tokenizer(from_bytes()), "", valid_packing="best_fit")
    batch = data.held_out(length, 100)
    asked = batch.targets[batch.targets >= 0].tolist()
    assert Counter(asked) == Counter(t for i in range(6) for t in valid.document(i)[1:].tolist())
    first = batch.inputs[batch.index == 0]
    assert {int(t) for t in first if t >= 1000} <= {1000, 1016, 2000, 3000, 4000, 5000}
    windows = Dataset(valid, valid, Tokenizer(from_bytes()), "").held_out(length, 100)
    assert {int(t) % 1000 for t in windows.inputs[windows.index == 0]} - {0, 16}
    assert len(data.held_out(length, 1).inputs) == length


def test_padding_is_seen_by_nothing_and_predicted_from_nothing() -> None:
    loader = Loader(shard([5, 3]), 1, 9, 0, texts=BestFit(shard([5, 3]), 9, 0))
    batch = next(loader)
    assert batch.inputs.tolist() == [0, 1, 2, 3, 4, 1000, 1001, 1002, 0]
    assert batch.targets.tolist() == [1, 2, 3, 4, -1, 1001, 1002, -1, -1]
    assert batch.seq.tolist() == [0] * 5 + [1] * 3 + [2]
    assert batch.index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0]
    assert BestFit(shard([5, 3]), 9, 0).padding == pytest.approx(0.2)


class Told:
    """A source that says which row was asked for."""

    def __init__(self, number: int) -> None:
        self.number, self.rows, self.key = number, 100, ""

    def row(self, number: int) -> Rows:
        tokens = np.full((1, 2), self.number * 1_000_000 + number)
        return Rows(tokens, tokens == 0, tokens == 0)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (7.0, 2.0, 1.0), (0.001, 0.9, 0.3)])
def test_a_blend_keeps_its_shares_and_reads_each_source_in_order(weights: tuple[float, ...]) -> None:
    blend = Blend([Told(i) for i in range(len(weights))], weights, seed=1)
    seen: dict[int, list[int]] = {i: [] for i in range(len(weights))}
    for number in range(2 * BLOCK + 100):
        source, row = divmod(int(blend.row(number).tokens[0, 0]), 1_000_000)
        seen[source].append(row)
        if number + 1 in (BLOCK, 2 * BLOCK):
            for i, weight in enumerate(weights):
                assert abs(len(seen[i]) - (number + 1) * weight / sum(weights)) <= 1
    assert all(rows == list(range(len(rows))) for rows in seen.values())
    again = Blend([Told(i) for i in range(len(weights))], weights, seed=1)
    for number in (BLOCK + 7, 3, 2 * BLOCK + 1):  # any row at any time
        assert int(again.row(number).tokens[0, 0]) == int(blend.row(number).tokens[0, 0])


def test_a_blend_refuses_a_share_that_it_cannot_keep() -> None:
    with pytest.raises(ValueError, match="weight: a share of"):
        Blend([Told(0), Told(1)], [1e-4, 0.9999], 0)


MIXTURE = {
    "kind": "mixture",
    "parts": [
        {"weight": 3, "corpus": {"kind": "generated", "documents": 40, "document_bytes": 200}},
        {"weight": 1, "corpus": {"kind": "generated", "documents": 40, "document_bytes": 200, "seed": 9}},
    ],
}


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_mixture_trains_on_its_shares_and_resumes(tmp_path: Path, packing: str) -> None:
    from dataclasses import replace

    data = open_dataset(CorpusSpec.model_validate(MIXTURE), TokenizerSpec(), tmp_path)
    data = replace(data, packing=packing)  # type: ignore[arg-type]
    assert [count for _, count in data.parts] == [len(data.train) - data.parts[1][1], data.parts[1][1]]
    first = {bytes(data.train.document(i)[:40].tolist()) for i in range(data.parts[0][1])}
    stream, other = data.stream(4, 64, 5), data.stream(4, 64, 5)
    for _ in range(7):
        next(other)
        batch = next(stream)
    third = data.stream(4, 64, 5)
    third.restore(other.state())
    assert next(third).inputs.equal(next(stream).inputs) and batch.grid == (4, 64)
    assert len(first) > 30
    with pytest.raises(ValueError, match="data state"):
        replace(data, packing="concatenate" if packing == "best_fit" else "best_fit").stream(4, 64, 5).restore(
            other.state()
        )
    mine = replace(data, parts=()).stream(4, 64, 5)
    with pytest.raises(ValueError, match="data state"):
        mine.restore(other.state())


def test_the_parts_of_a_mixture_are_their_own_documents(tmp_path: Path) -> None:
    data = open_dataset(CorpusSpec.model_validate(MIXTURE), TokenizerSpec(), tmp_path)
    alone = open_dataset(CorpusSpec.model_validate(MIXTURE["parts"][1]["corpus"]), TokenizerSpec(), tmp_path)
    end = len(data.train)
    part = data.train.part(end - data.parts[1][1], end)
    assert part.tokens.tolist() == alone.train.tokens.tolist() and part.offsets.tolist() == alone.train.offsets.tolist()
    rows = [Epochs(part, 32, 1).row(i).tokens.tolist() for i in range(5)]
    assert rows == [Epochs(alone.train, 32, 1).row(i).tokens.tolist() for i in range(5)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": MIXTURE["parts"][:1]}, "two or more"),
        ({"valid_one_in": 5}, "the parts of a mixture say theirs"),
        ({"clean": {"min_chars": 3}}, "cleaned one by one"),
        ({"parts": [{"weight": 0, "corpus": {}}, {"weight": 1, "corpus": {}}]}, "greater than 0"),
        ({"parts": [{"weight": 1, "corpus": MIXTURE}, {"weight": 1, "corpus": {}}]}, "accepted in a mixture"),
        ({"kind": "stdlib"}, "does not use parts"),
    ],
)
def test_mixtures_that_are_none(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CorpusSpec.model_validate({**MIXTURE, **changes})
