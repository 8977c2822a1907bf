"""Tasks that ask for what the row said, read again symbol by symbol; what is drawn is drawn evenly."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from assay.data.packing import IGNORED
from assay.data.tasks._tools import different
from assay.data.tasks.base import Dice
from assay.data.tasks.common_words import CommonWords
from assay.data.tasks.compression import Compression
from assay.data.tasks.copy import Copy
from assay.data.tasks.frequent_words import FrequentWords
from assay.data.tasks.fuzzy_recall import FuzzyRecall
from assay.data.tasks.in_context_recall import InContextRecall
from assay.data.tasks.induction import Induction
from assay.data.tasks.memorisation import Memorisation
from assay.data.tasks.needle import Needle
from assay.data.tasks.noisy_recall import NoisyRecall
from assay.data.tasks.phonebook import Phonebook
from assay.data.tasks.reversal import Reversal
from assay.data.tasks.selective_copy import SelectiveCopy
from assay.data.tasks.stacked_mqar import StackedMqar
from assay.data.tasks.variable_tracking import VariableTracking

SEEDS = st.integers(0, 10**9)


def even(counts: np.ndarray) -> bool:
    return bool(stats.chisquare(counts).pvalue > 1e-3)


@given(SEEDS)
def test_copies_are_copies(seed: int) -> None:
    selective, plain, whole = SelectiveCopy(length=40, copies=5), Copy(length=20, least=2), Compression(length=22)
    examples = selective.draw(4, seed)
    for inputs, targets in zip(examples.inputs.tolist(), examples.targets.tolist()):
        assert inputs[34:] == [15, 14, 14, 14, 14, 14]
        assert targets == [IGNORED] * 35 + [s for s in inputs[:34] if s != 14] and len(targets) == 40
    examples = plain.draw(4, seed)
    for inputs, targets in zip(examples.inputs.tolist(), examples.targets.tolist()):
        string = inputs[: inputs.index(26)]
        n = len(string)
        assert 2 <= n <= 10 and inputs == (string + [26] + string + [27] * 20)[:20]
        assert targets == [IGNORED] * n + string + [IGNORED] * (20 - 2 * n)
    examples = whole.draw(4, seed)
    for inputs, targets in zip(examples.inputs.tolist(), examples.targets.tolist()):
        assert inputs[10:] == [15] + [14] * 11 and targets == [IGNORED] * 11 + inputs[:10] + [IGNORED]
    odd = Compression(length=21).draw(1, seed)
    assert odd.inputs[0, 10:].tolist() == [15] + [14] * 10
    assert odd.targets[0].tolist() == [IGNORED] * 11 + odd.inputs[0, :10].tolist()


def test_what_is_copied_is_drawn_evenly() -> None:
    for task in (SelectiveCopy(), Copy(), Compression()):
        examples = task.draw(2000, 1)
        assert even(np.bincount(examples.targets[examples.asked])), task.kind
    inputs = SelectiveCopy(length=33, copies=4).draw(4000, 1).inputs[:, :28]
    assert even((inputs != 14).sum(0))
    assert even(np.bincount(Copy().draw(4000, 1).asked.sum(1))[1:])


@given(SEEDS)
def test_a_block_is_repeated_and_asked_from_its_second_turn_on(seed: int) -> None:
    examples = Induction().draw(4, seed)
    for inputs, targets in zip(examples.inputs.tolist(), examples.targets.tolist()):
        p = inputs.index(inputs[0], 1) if inputs[0] in inputs[1:] else 64
        assert 16 <= p <= 32 and len(set(inputs[:p])) == p
        again = [inputs[t % p] for t in range(65)]
        assert inputs == again[:64] and targets == [IGNORED] * p + again[p + 1 :]


def test_no_fixed_distance_solves_induction() -> None:
    task = Induction()
    examples = task.draw(2000, 1)
    assert even(np.bincount((~examples.asked).sum(1))[16:])
    before = np.pad(examples.inputs, ((0, 0), (64, 0)), constant_values=-1)
    lags = [examples.accuracy(before[:, 64 - lag : 128 - lag]) for lag in range(64)]
    best = next(s for name, s in task.shortcuts().items() if "back" in name)
    measured = examples.accuracy(best.answer(examples.inputs))
    assert max(lags) == pytest.approx(best.at_most, abs=0.02) and best.at_most < 0.15
    assert measured == pytest.approx(best.at_most, abs=0.02)


@pytest.mark.parametrize("task", [InContextRecall(length=40), NoisyRecall(length=40, noise=0.4)])
@given(seed=SEEDS)
def test_a_repeated_key_has_its_value(task: InContextRecall | NoisyRecall, seed: int) -> None:
    examples = task.draw(4, seed)
    for inputs, targets in zip(examples.inputs.tolist(), examples.targets.tolist()):
        known: dict[int, int] = {}
        for key, value, answer, rest in zip(inputs[::2], inputs[1::2], targets[::2], targets[1::2]):
            noise = key >= 16
            assert (value >= 16) == noise and (noise or (key < 8 <= value))
            assert rest == IGNORED and answer == known.get(key, IGNORED)
            if not noise:
                assert known.setdefault(key, value) == value


def test_a_fifth_of_the_pairs_is_noise() -> None:
    pairs = NoisyRecall().draw(1000, 1).inputs[:, ::2] >= 16
    assert pairs.mean() == pytest.approx(0.2, abs=4 * 0.4 / np.sqrt(pairs.size))


@given(SEEDS)
def test_motifs_are_those_that_stood_there_before(seed: int) -> None:
    """A row, cut where a value ends and a key begins."""
    examples = FuzzyRecall().draw(4, seed)
    for inputs, targets in zip(examples.inputs.tolist(), examples.targets.tolist()):
        ends = [t for t in range(127) if inputs[t] >= 7 > inputs[t + 1]] + [127]
        known: dict[tuple[int, ...], list[int]] = {}
        start = 0
        for end in ends:
            pair = [s for s in inputs[start : end + 1] if s < 14]
            key, value = tuple(s for s in pair if s < 7), [s for s in pair if s >= 7]
            due = targets[start + len(key) - 1 : end]
            if key in known and end < 127:
                assert value == known[key] == due
            elif end < 127:
                assert set(due) <= {IGNORED}
                known[key] = value
            start = end + 1
        assert {len(key) for key in known} <= {1, 2, 3} and {len(v) for v in known.values()} <= {1, 2, 3}
        assert len(known) <= 8


def one_lookup(row: list[int], place: int) -> int:
    """What stood behind the symbol at a place, the last time before it; or 0."""
    return next((row[t + 1] for t in reversed(range(place)) if row[t] == row[place]), 0)


def test_one_symbol_does_not_tell_a_motif() -> None:
    task = FuzzyRecall()
    examples = task.draw(2000, 1)
    found = [one_lookup(examples.inputs[r].tolist(), t) for r, t in np.argwhere(examples.asked).tolist()]
    reached = float(np.mean(found == examples.targets[examples.asked]))
    shortcut = task.shortcuts()["what followed this symbol last"]
    assert examples.accuracy(shortcut.answer(examples.inputs)) == pytest.approx(reached, abs=1e-12)
    assert reached < shortcut.at_most < reached + 0.03 < 0.6
    single = FuzzyRecall(motif=1, keys=7)
    assert single.shortcuts()["what followed this symbol last"].at_most == 1.0, "then it is what is asked"


def test_motifs_of_many_symbols_need_no_list_of_all() -> None:
    """Of 230^8 motifs, which is just below 2^63."""
    task = FuzzyRecall(symbols=230, motif=8, keys=16, length=500)
    examples = task.draw(8, 1)
    answers = task.solve(examples.inputs)
    assert np.array_equal(answers[examples.asked], examples.targets[examples.asked]) and examples.asked.any()
    assert len(np.unique(examples.inputs)) > 200


def test_the_map_is_one_to_one_and_its_own_seeds() -> None:
    task, other = Memorisation(), Memorisation(map_seed=1)
    assert sorted(task.values.tolist()) == list(range(127, 254))
    assert (task.values != other.values).mean() > 0.9
    examples = task.draw(200, 1)
    pairs = set(zip(examples.inputs[:, ::2].ravel().tolist(), examples.targets[:, 1::2].ravel().tolist()))
    assert pairs == set(enumerate(task.values.tolist()))
    assert (examples.targets[:, ::2] == IGNORED).all() and (examples.inputs[:, 1::2] == 255).all()


@given(SEEDS)
def test_the_book_has_the_number(seed: int) -> None:
    examples = Phonebook(length=60, name=2, digits=3).draw(4, seed)
    for inputs, targets in zip(examples.inputs.tolist(), examples.targets.tolist()):
        text = "".join("0123456789abcdefghijklmnopqrstuvwxyz;?"[s] for s in inputs)
        book, question = text.split("?")
        entries = {entry[:2]: entry[2:] for entry in book.split(";")[:-1]}
        assert len(entries) == 9 and all(number.isdigit() and len(number) == 3 for number in entries.values())
        number, place = entries[question[:2]], len(book) + 2
        assert question == question[:2] + number
        assert targets == [IGNORED] * place + [int(d) for d in number] + [IGNORED] * (60 - place - 3)


@pytest.mark.parametrize("high", [7, 14, 21, 7000])
def test_different_numbers_are_different_and_even(high: int) -> None:
    found = different(Dice(4000, 0, "test"), "numbers", 5, high)
    assert all(len(set(row)) == 5 for row in found.tolist())
    for place in (0, 4):
        assert even(np.bincount(found[:, place] * 7 // high))
    again = different(Dice(1, 17, "test"), "numbers", 5, high)
    assert np.array_equal(again[0], found[17])


@given(SEEDS, st.integers(1, 6), st.data())
def test_needles_are_found(seed: int, keys: int, data: st.DataObject) -> None:
    queries = data.draw(st.integers(1, keys))
    task = Needle(length=60, keys=keys, queries=queries)
    examples = task.draw(4, seed)
    for inputs, targets in zip(examples.inputs.tolist(), examples.targets.tolist()):
        hay, questions = inputs[: 60 - 2 * queries], inputs[60 - 2 * queries :]
        marks = [t for t, s in enumerate(hay) if s == 144]
        held = {hay[t + 1]: hay[t + 2] for t in marks}
        assert len(held) == len(set(held.values())) == keys
        inside = {t + i for t in marks for i in range(3)}
        assert all(128 <= s < 144 for t, s in enumerate(hay) if t not in inside)
        assert questions[::2] == [145] * queries and len(set(questions[1::2])) == queries
        due = [x for key in questions[1::2] for x in (IGNORED, held[key])]
        assert targets == [IGNORED] * len(hay) + due


@given(SEEDS, st.integers(2, 4), st.integers(1, 5))
def test_variables_hold_what_they_were_set_to(seed: int, chains: int, hops: int) -> None:
    task = VariableTracking(length=90, chains=chains, hops=hops)
    examples = task.draw(4, seed)
    for inputs, targets in zip(examples.inputs.tolist(), examples.targets.tolist()):
        body, questions = inputs[: 90 - 2 * chains], inputs[90 - 2 * chains :]
        source = {body[t + 1]: body[t + 2] for t, s in enumerate(body) if s == 49}
        assert len(source) == chains * (hops + 1) and body.count(48) == len(body) - 3 * len(source)
        order = list(source)
        assert questions[::2] == [50] * chains and len(set(questions[1::2])) == chains
        for variable, rest, answer in zip(
            questions[1::2], targets[90 - 2 * chains :: 2], targets[91 - 2 * chains :: 2]
        ):
            for _ in range(hops):
                assert order.index(source[variable]) < order.index(variable)
                variable = source[variable]
            assert 32 <= source[variable] < 48 and (rest, answer) == (IGNORED, source[variable])


@given(SEEDS)
def test_words_stand_as_often_as_they_should(seed: int) -> None:
    for inputs, targets in rows(CommonWords(), seed):
        listed, order = Counter(inputs[:60]), list(dict.fromkeys(inputs[:60]))
        assert sorted(listed.values()) == [2] * 16 + [4] + [6] * 4 and listed[64] == 4
        common = [word for word in order if listed[word] == 6]
        assert inputs[60:] == [65, *common[:-1]] and targets == [IGNORED] * 60 + common
    task = FrequentWords()
    # 125 places; zeta(2) = pi^2 / 6.
    expected = [int(125 / r**2 * 6 / np.pi**2) for r in range(2, 9)]
    for inputs, targets in rows(task, seed):
        listed = Counter(inputs[:125])
        assert listed.pop(64) == 125 - sum(expected)
        found = sorted(listed, key=lambda word: -listed[word])
        assert [listed[word] for word in found] == expected == list(task.often)
        assert inputs[125:] == [65, *found[:2]] and targets == [IGNORED] * 125 + found[:3]


def rows(task: CommonWords | FrequentWords, seed: int) -> list[tuple[list[int], list[int]]]:
    examples = task.draw(3, seed)
    return list(zip(examples.inputs.tolist(), examples.targets.tolist()))


@given(SEEDS)
def test_stacked_pairs_are_read_by_place(seed: int) -> None:
    """A symbol is taken apart by counting, and a row is read with a dictionary; passes repeat its pairs."""
    task = StackedMqar(length=30, pairs=5, keys=7, values=6, passes=2)
    names = {13 + 6 * k + v: (k, 7 + v) for k in range(7) for v in range(6)}
    examples = task.draw(4, seed)
    for inputs, targets in zip(examples.inputs.tolist(), examples.targets.tolist()):
        worth = dict(names[symbol] for symbol in inputs[:5])
        assert len(worth) == len(set(worth.values())) == 5
        assert sorted(inputs[:5]) == sorted(inputs[5:10])
        assert targets == [IGNORED] * 10 + [worth[key] for key in inputs[10:]]


def test_stacked_pairs_and_questions_are_even() -> None:
    """One of each a row, since what stands in one row hangs together."""
    examples = StackedMqar().draw(6000, 1)
    assert even(np.bincount(examples.targets[:, 8], minlength=64)[32:])
    assert even(np.bincount(examples.inputs[:, 0] - 64, minlength=1024))
    assert even(np.bincount(examples.inputs[:, 8], minlength=32))
    twice = StackedMqar(length=64, passes=2).draw(500, 1).inputs
    assert (twice[:, :8] == twice[:, 8:16]).mean() == pytest.approx(1 / 8, abs=0.03)


def test_lists_are_shuffled() -> None:
    frequent, common, needle = (task.draw(2000, 1) for task in (FrequentWords(), CommonWords(), Needle()))
    first = frequent.targets[:, 125:126]
    assert even((frequent.inputs[:, :125] == first).sum(0))
    assert even((common.inputs[:, :60, None] == common.targets[:, None, 60:]).any(2).sum(0))
    assert even(np.bincount((needle.inputs == 144).argmax(1), minlength=124))


def test_chains_stand_in_each_others_way() -> None:
    """Of the 9 statements behind the first, 4 are of its chain; the next of a chain is set to what that one sets."""
    inputs = VariableTracking().draw(2000, 1).inputs
    marks = np.argsort(inputs != 49, axis=1, kind="stable")[:, :2]
    variable, source = (np.take_along_axis(inputs, marks + i, 1) for i in (1, 2))
    assert (source[:, 1] == variable[:, 0]).mean() == pytest.approx(4 / 9, abs=4 * 0.5 / np.sqrt(2000))


def test_sizes_of_motifs_and_of_longer_strings() -> None:
    """The first value of a row; and strings that are longer than all that were learned."""
    rows = FuzzyRecall().draw(2000, 1).inputs
    value, key = (rows >= 7) & (rows < 14), rows < 7
    begins = value.argmax(1)[:, None]
    ends = (key & (np.arange(128) > begins)).argmax(1)
    assert even(np.bincount(ends - begins[:, 0], minlength=4)[1:])
    for task in (Copy(length=20, least=2), Reversal(length=20, least=2)):
        assert set(task.longer(3).draw(500, 1).asked.sum(1).tolist()) == set(range(11, 31))
