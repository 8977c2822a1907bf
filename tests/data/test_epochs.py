"""Text that is read again and again: how much of it there is, and how often a run reads it."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from assay.data.dataset import some
from assay.data.shards import Shard
from assay.data.tasks.mqar import Mqar
from assay.train.loop import dataset
from tests.train.small import recipe

LENGTHS = np.random.default_rng(0).integers(5, 40, 30)
SHARD = Shard.of([[i] * int(n) for i, n in enumerate(LENGTHS)])


def test_fewer_tokens_are_among_more() -> None:
    sizes = [40, 120, 400, len(SHARD.tokens)]
    found = [some(SHARD, size) for size in sizes]
    for size, shard in zip(sizes, found, strict=True):
        assert len(shard.tokens) == size
    held = [Counter(shard.tokens.tolist()) for shard in found]
    assert all(few <= many for few, many in pairwise(held))
    assert held[-1] == Counter(SHARD.tokens.tolist())


def test_passages_of_a_long_document_are_not_all_of_one() -> None:
    long = Shard.of([(np.arange(5000) % 250 + i).tolist() for i in range(6)])
    eighth = some(long, len(long.tokens) // 8)
    assert len(eighth.tokens) == 3750 and [len(eighth.document(i)) for i in range(len(eighth))].count(1024) >= 2
    assert len({int(eighth.document(i).max()) for i in range(len(eighth))}) > 1
    whole = long.tokens.tobytes()
    assert all(eighth.tokens[a:b].tobytes() in whole for a, b in pairwise(eighth.offsets.tolist()))


@pytest.mark.parametrize("epochs", [2, 4])
def test_a_run_reads_its_text_as_often_as_it_says(epochs: int) -> None:
    """By the loader's own count, and by the documents that it reads."""
    how = recipe(batch__epochs=epochs, tokens=1024)
    stream = dataset(how).stream(how.batch.rows, how.batch.length, how.seed)
    for _ in range(how.steps(1)):
        next(stream)
    # What is left over at the end of an epoch is less than a row.
    assert epochs * 0.8 < stream.epoch <= epochs * 1.1  # type: ignore[attr-defined]
    assert dataset(recipe()).stream(1, 16, 0).state() != dataset(how).stream(1, 16, 0).state()


def test_what_cannot_be_read_again_is_refused() -> None:
    with pytest.raises(ValueError, match="5000 tokens are to be read again; the documents have"):
        some(SHARD, 5000)
    with pytest.raises(ValueError, match=r"batch.epochs: how much text a run reads has to be said"):
        dataset(recipe(batch__epochs=2, tokens={"per_param": 20}))
    with pytest.raises(ValueError, match=r"batch.packing, batch.epochs, evaluation.packing: a task has its own rows"):
        recipe(batch__epochs=2, batch__length=64, data=Mqar(length=64).model_dump())
