"""What holds for every diagnostic task: streams, oracles, floors, shortcuts, longer rows, and sizes that cannot be."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.data.packing import IGNORED
from assay.data.tasks.base import Examples, Ids, Task, task_class, tasks

KINDS = sorted(tasks())
ROWS = 2000
FAILS = 0.8


@st.composite
def sizes(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    """Fields of a task that can be: the smallest that can, and some more."""

    def some(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    return _recalling(kind, some) or _others(kind, some, draw)


def _others(kind: str, some: Callable[[int, int], int], draw: st.DrawFn) -> dict[str, Any]:
    spare = some(0, 40)
    match kind:
        case "parity" | "majority":
            return {"length": 2 + spare}
        case "modular_addition":
            return {"length": 2 + spare, "modulus": some(2, 9)}
        case "word_problem":
            return {"length": 2 + spare, "group": draw(st.sampled_from(["S3", "A5", "S5"]))}
        case "dyck":
            return {"length": 6 + 2 * spare, "kinds": some(2, 5), "depth": some(2, 9)}
        case "addition":
            least = some(1, 30)
            return {"length": 3 * least + 2 + spare, "least": least}
        case "copy" | "reversal":
            least = some(1, 9)
            return {"length": 2 * least + spare, "least": least, "symbols": some(2, 30)}
        case "compression":
            return {"length": 3 + spare, "symbols": some(2, 30)}
        case "selective_copy":
            copies = some(1, 9)
            return {"length": 2 * copies + 1 + spare, "copies": copies, "symbols": some(2, 30)}
        case "memorisation":
            return {"length": 2 + spare, "symbols": some(5, 300), "map_seed": some(0, 9)}
        case "induction":
            least, more = some(2, 9), some(0, 9)
            most = least + more
            return {"length": most + 1 + spare, "least": least, "most": most, "symbols": most + some(0, 5)}
    return {}


def _recalling(kind: str, some: Callable[[int, int], int]) -> dict[str, Any]:
    spare = some(0, 40)
    match kind:
        case "stacked_mqar":
            pairs, passes = some(2, 9), some(1, 3)
            enough = {"keys": 4 * pairs + some(0, 9), "values": 4 * pairs + some(0, 9)}
            return {"length": pairs * (passes + 1) + spare, "pairs": pairs, "passes": passes, **enough}
        case "in_context_recall":
            return {"length": 20 + 2 * spare, "keys": some(2, 5), "values": some(2, 9)}
        case "noisy_recall":
            noise = some(0, 5) / 10
            return {"length": 20 + 2 * spare, "keys": some(2, 5), "noise": noise, "noise_symbols": some(1, 9)}
        case "fuzzy_recall":
            return {"length": 64 + spare, "keys": some(2, 4), "symbols": some(4, 9), "motif": some(1, 4)}
        case "phonebook":
            name, digits = some(1, 4), some(1, 4)
            length = 3 * (name + digits) + 2 + spare
            return {"length": length, "letters": some(26, 30), "name": name, "digits": digits}
        case "needle":
            keys = some(1, 9)
            queries = some(1, keys)
            length = 3 * keys + 2 * queries + spare
            return {"length": length, "keys": keys, "queries": queries, "symbols": keys + 1 + some(0, 9)}
        case "variable_tracking":
            chains, hops = some(2, 4), some(1, 5)
            length = chains * (3 * hops + 5) + spare
            return {"length": length, "chains": chains, "hops": hops, "values": chains + some(0, 9)}
        case "common_words":
            common, times, rare, rare_times = some(1, 5), some(3, 6), some(1, 9), some(1, 2)
            length = common * times + rare * rare_times + common + spare
            counts = {"common": common, "times": times, "rare": rare, "rare_times": rare_times}
            return {"length": length, **counts, "symbols": common + rare + some(0, 5)}
        case "frequent_words":
            return {"length": 120 + spare, "top": some(1, 3), "alpha": some(19, 21) / 10, "symbols": some(20, 40)}
    return {}


def built(kind: str, **fields: Any) -> Task:
    return task_class(kind).model_validate({"kind": kind, **fields})


def measured(examples: Examples, answers: Ids) -> tuple[float, float]:
    """Accuracy and its standard error; what is asked in one row may hang together."""
    asked, right = examples.asked.sum(1), ((answers == examples.targets) & examples.asked).sum(1)
    accuracy = right.sum() / asked.sum()
    return float(accuracy), float(np.sqrt(((right - accuracy * asked) ** 2).sum()) / asked.sum())


def solved(task: Task, examples: Examples) -> bool:
    return np.array_equal(task.solve(examples.inputs)[examples.asked], examples.targets[examples.asked])


def most_often(examples: Examples, vocab: int, by: Ids) -> Ids:
    """For each value of `by` [R, T] the target that stands most often where it does."""
    found = np.zeros((int(by.max()) + 1, vocab), np.int64)
    np.add.at(found, (by[examples.asked], examples.targets[examples.asked]), 1)
    return found.argmax(1)


def everywhere(examples: Examples) -> Ids:
    return np.zeros_like(examples.inputs)


def places(examples: Examples) -> Ids:
    return np.broadcast_to(np.arange(examples.inputs.shape[1]), examples.inputs.shape)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), seed=st.integers(0, 10**9))
def test_the_oracle_is_always_right(kind: str, data: st.DataObject, seed: int) -> None:
    task = built(kind, **data.draw(sizes(kind)))
    examples = task.draw(8, seed)
    for array in (examples.inputs, examples.targets):
        assert array.shape == (8, task.length) and array.dtype == np.int64
    assert examples.inputs.min() >= 0 and max(examples.inputs.max(), examples.targets.max()) < task.vocab
    assert examples.targets[~examples.asked].tolist() == [IGNORED] * int((~examples.asked).sum())
    if examples.prefix is not None:
        first = examples.asked.argmax(1)
        assert np.array_equal(first, examples.prefix - 1), "the last symbol of a prefix is asked what follows it"
    assert solved(task, examples)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10**9), data=st.data())
def test_the_oracle_does_not_look_ahead(kind: str, seed: int, data: st.DataObject) -> None:
    """Its answers are the same when what follows a question is another row's."""
    task = built(kind)
    examples, other = task.draw(4, seed), task.draw(4, seed + 1)
    place = data.draw(st.sampled_from(np.flatnonzero(examples.asked.any(0)).tolist()))
    upto = np.arange(task.length) <= place
    asked = examples.asked[:, place]
    answers = task.solve(np.where(upto, examples.inputs, other.inputs)[asked])[:, upto]
    targets = examples.targets[asked][:, upto]
    assert np.array_equal(np.where(targets == IGNORED, IGNORED, answers), targets)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_its_seed_and_its_number(kind: str) -> None:
    task = built(kind)
    whole = task.draw(24, 7)
    pieces = [task.draw(rows, 7, first) for first, rows in ((0, 5), (5, 1), (6, 18))]
    for name in ("inputs", "targets", *(() if whole.prefix is None else ("prefix",))):
        assert np.array_equal(np.concatenate([getattr(p, name) for p in pieces]), getattr(whole, name))
    other = task.draw(24, 8)
    assert (whole.inputs != other.inputs).any(1).all()
    assert len({tuple(row) for row in whole.inputs.tolist()}) == 24


@pytest.mark.parametrize("kind", KINDS)
def test_the_floor_is_the_best_guess_without_the_context(kind: str) -> None:
    """Guesses made from 2000 rows and scored on others: one for all places, and one for every place."""
    task = built(kind)
    seen, fresh = task.draw(ROWS, 1), task.draw(ROWS, 2)
    guess = most_often(seen, task.vocab, everywhere(seen))
    accuracy, error = measured(fresh, guess[everywhere(fresh)])
    assert accuracy == pytest.approx(task.floor, abs=4 * error)
    guess = most_often(seen, task.vocab, places(seen))
    accuracy, error = measured(fresh, guess[places(fresh)])
    assert accuracy <= task.floor + 4 * error


@pytest.mark.parametrize("kind", KINDS)
def test_shortcuts_fail_as_they_say(kind: str) -> None:
    task = built(kind)
    examples = task.draw(ROWS, 3)
    for name, shortcut in task.shortcuts().items():
        accuracy, error = measured(examples, shortcut.answer(examples.inputs))
        assert accuracy <= shortcut.at_most + 4 * error, name
        assert accuracy < FAILS and shortcut.at_most < FAILS, name
    guess = most_often(task.draw(ROWS, 4), task.vocab, task.draw(ROWS, 4).inputs)
    padded = np.pad(guess, (0, task.vocab - len(guess)))
    assert measured(examples, padded[examples.inputs])[0] < FAILS, "the last symbol decides"


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), factor=st.integers(2, 4))
def test_longer_rows_have_the_same_symbols(kind: str, data: st.DataObject, factor: int) -> None:
    # Longer rows of these two need more names, or words, than their smallest alphabets have.
    task = built(kind, **(data.draw(sizes(kind)) if kind not in ("phonebook", "frequent_words") else {}))
    assert task.longer(1) == task
    longer = task.longer(factor)
    assert type(longer) is type(task) and longer.vocab == task.vocab and longer.length == factor * task.length
    examples = longer.draw(4, 5)
    assert solved(longer, examples)
    assert built(kind).longer(factor).draw(4, 5).asked.any(1).all()


REFUSED = [
    ("word_problem", {"group": "A4"}, "group"),
    ("modular_addition", {"modulus": 1}, "modulus"),
    ("dyck", {"length": 9}, "length: 9; accepted: even numbers, for every bracket is closed"),
    ("addition", {"length": 32, "least": 11}, "length: 32; numbers of 11 (least) digits need 35 or more"),
    ("copy", {"length": 9, "least": 5}, "length: 9; strings of 5 (least) symbols and their copies need 10 or more"),
    ("reversal", {"length": 9, "least": 5}, "length: 9; strings of 5 (least) symbols, there and back, need 10 or more"),
    ("selective_copy", {"length": 32}, "length: 32; 16 symbols, a mark and as many answers need 33 or more"),
    ("induction", {"most": 8}, "most: 8; blocks of 16 (least) symbols need 16 or more"),
    ("induction", {"symbols": 31}, "symbols: 31; blocks of 32 (most) different symbols need 32 or more"),
    ("induction", {"length": 32}, "length: 32; blocks of 32 (most) symbols and a repeated one need 33 or more"),
    ("stacked_mqar", {"length": 15}, "length: 15; 8 pairs, each asked, need 16 or more"),
    ("stacked_mqar", {"values": 7}, "values: 7; 8 pairs need 8 or more"),
    ("in_context_recall", {"length": 33}, "length: 33; accepted: even numbers, for a row is made of pairs"),
    ("noisy_recall", {"noise": 1.0}, "noise"),
    ("fuzzy_recall", {"symbols": 2, "keys": 9}, "keys: 9; 3 of size 1, and 2 exist"),
    ("fuzzy_recall", {"length": 11}, "length: 11; two pairs of motifs of 3 need 12"),
    ("fuzzy_recall", {"symbols": 240, "motif": 8}, "symbols: 240; accepted for strings of 8: fewer than 2^63"),
    ("phonebook", {"name": 14}, "letters: 26; accepted for strings of 14: fewer than 2^63 different ones"),
    ("phonebook", {"length": 22}, "length: 22; two entries and a question need 23 or more"),
    ("phonebook", {"name": 1, "letters": 26}, "name: 1 of 26 letters; 41 entries, 26 names"),
    ("needle", {"keys": 65}, "symbols: 64; 65 keys, and values, that differ need 65 or more"),
    ("needle", {"queries": 2}, "queries: 2; accepted: at most one for each of the 1 keys"),
    ("needle", {"keys": 8, "length": 20}, "length: 20; 8 needles and 1 questions need 26 or more"),
    ("variable_tracking", {"hops": 16}, "symbols: 32; 2 chains of 16 hops need 34 or more"),
    ("variable_tracking", {"length": 33}, "length: 33; 10 statements and their questions need 34 or more"),
    ("variable_tracking", {"values": 2, "chains": 3}, "values: 2; 3 chains need 3 or more"),
    ("common_words", {"times": 2}, "times: 2; words that are rare at 2 times need 3 or more"),
    ("common_words", {"symbols": 19}, "symbols: 19; 4 common and 16 rare words need 20 or more"),
    ("common_words", {"length": 59}, "length: 59; 56 listed words and their questions need 60 or more"),
    ("frequent_words", {"top": 5}, "top: 5; in rows of 128 (length) words stand (18, 8, 4, 2, 2, 1, 1) times"),
    ("frequent_words", {"symbols": 6}, "symbols: 6; 7 words need 7 or more"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), REFUSED)
def test_sizes_that_cannot_be_are_named(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        built(kind, **fields)
