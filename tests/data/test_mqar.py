"""Associative recall: its labels by walking the row with a dictionary, its bounds by measurement."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from assay.data.packing import IGNORED
from assay.data.tasks.base import Dice, place_in, task_class, tasks
from assay.data.tasks.mqar import Mqar
from assay.spec.load import validate

FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "spaced": {"queries": "spaced"},
    "spaced evenly": {"queries": "spaced", "power": 1.0},
    "rewritten": {"rewrites": 6},
    "two parts": {"parts": 2, "length": 113},
    "two parts, rewritten, spaced": {"parts": 2, "length": 112, "rewrites": 4, "queries": "spaced"},
    "odd symbols": {"symbols": 33, "pairs": 5, "length": 23},
}
form = pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)


def walked(row: list[int], task: Mqar) -> dict[tuple[int, ...], int]:
    """What each key is worth after the pairs of one row, read symbol by symbol."""
    worth: dict[tuple[int, ...], int] = {}
    for i in range(task.pairs):
        start = i * (task.parts + 1)
        worth[tuple(row[start : start + task.parts])] = row[start + task.parts]
    return worth


@form
def test_every_label_is_the_last_value_of_the_key_that_stands_there(fields: dict[str, Any]) -> None:
    task = Mqar(**fields)
    drawn = task.draw(40, seed=1)
    asked = 0
    for row, targets in zip(drawn.inputs.tolist(), drawn.targets.tolist(), strict=True):
        worth = walked(row, task)
        assert len(worth) == task.pairs - task.rewrites
        for place, target in enumerate(targets):
            if target != IGNORED:
                assert target == worth[tuple(row[place + 1 - task.parts : place + 1])]
                asked += 1
    assert asked == drawn.asked.sum() > 0


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.integers(2, 20),
    more=st.integers(0, 30),
    spare=st.integers(0, 40),
    parts=st.sampled_from([1, 2]),
    queries=st.sampled_from(["dense", "spaced"]),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_the_oracle_is_always_right(
    pairs: int, more: int, spare: int, parts: int, queries: str, seed: int, data: st.DataObject
) -> None:
    fewest = 1 if parts == 1 else 4
    pairs = max(pairs, fewest)
    rewrites = data.draw(st.integers(0, pairs - fewest))
    symbols = max(2 * pairs, 20) + spare
    sizes = {"length": pairs * (3 * parts + 1) + more, "pairs": pairs, "symbols": symbols, "rewrites": rewrites}
    task = Mqar(parts=parts, queries=queries, **sizes)  # type: ignore[arg-type]
    drawn = task.draw(7, seed)
    assert drawn.inputs.shape == drawn.targets.shape == (7, task.length)
    assert drawn.inputs.min() >= 0 and drawn.inputs.max() < task.vocab
    assert drawn.accuracy(task.solve(drawn.inputs)) == 1.0


@form
def test_an_answer_depends_on_nothing_that_comes_later(fields: dict[str, Any]) -> None:
    task = Mqar(**fields)
    drawn = task.draw(20, seed=2)
    cut = task.length - 5
    changed = drawn.inputs.copy()
    changed[:, cut:] = (changed[:, cut:] + 3) % task.vocab
    asked = drawn.asked[:, :cut]
    assert (task.solve(changed)[:, :cut] == drawn.targets[:, :cut])[asked].all()


def test_keys_and_values_come_from_two_halves_and_none_twice() -> None:
    drawn = Mqar().draw(200, seed=3)
    keys, values = drawn.inputs[:, 0:32:2], drawn.inputs[:, 1:32:2]
    assert keys.max() < 128 <= values.min()
    assert all(len(set(row)) == 16 for table in (keys, values) for row in table.tolist())
    assert set(keys.ravel()) == set(range(128)) and set(values.ravel()) == set(range(128, 256))


def test_dense_labels_stand_at_every_place_behind_the_pairs_and_spaced_ones_at_even_places_once_a_key() -> None:
    dense, spaced = Mqar().draw(50, seed=4), Mqar(queries="spaced").draw(50, seed=4)
    assert (dense.asked == (np.arange(64) >= 32)).all()
    assert not spaced.asked[:, :32].any() and not spaced.asked[:, 33::2].any()
    for row, asked in zip(spaced.inputs, spaced.asked, strict=True):
        assert sorted(row[asked]) == sorted(row[0:32:2])


def test_a_key_of_two_symbols_is_told_by_neither_alone() -> None:
    task = Mqar(parts=2, length=112)
    keys = task.draw(100, seed=5).inputs[:, :48].reshape(100, 16, 3)[:, :, :2]
    for row in keys.tolist():
        assert len({tuple(key) for key in row}) == 16
        for part in (0, 1):
            assert [sum(key[part] == other[part] for other in row) for key in row] == [4] * 16


def test_gaps_follow_the_power_law() -> None:
    """Against numpy's own draws without replacement, as the paper's generator makes them."""
    task, rows = Mqar(pairs=4, length=48, symbols=16, queries="spaced", power=0.1), 4000
    asked = task.draw(rows, seed=6).asked[:, 8::2].mean(0)
    weights = np.arange(1, 21) ** -0.9
    numpy_draws, counts = np.random.default_rng(0), np.zeros(20)
    for _ in range(rows):
        counts[numpy_draws.choice(20, 4, replace=False, p=weights / weights.sum())] += 1
    spread = np.sqrt(2 * asked * (1 - asked) / rows)
    assert (np.abs(asked - counts / rows) < 4.5 * spread).all()
    assert asked[0] > 4 * asked[-1]


@form
def test_floor_and_shortcuts_reach_what_they_claim_and_no_more(fields: dict[str, Any]) -> None:
    task = Mqar(**fields)
    drawn = task.draw(3000, seed=7)
    constant = np.full_like(drawn.inputs, task.vocab - 1)
    assert abs(drawn.accuracy(constant) - task.floor) < 5 * np.sqrt(task.floor / 3000)
    for name, shortcut in task.shortcuts().items():
        reached = drawn.accuracy(shortcut.answer(drawn.inputs))
        assert reached < shortcut.at_most + 5 * np.sqrt(0.25 / 3000), name
        assert shortcut.at_most < 0.8, name
    stale = task.shortcuts().get("first value of the key")
    assert (stale is None) == (task.rewrites == 0)
    assert stale is None or abs(drawn.accuracy(stale.answer(drawn.inputs)) - stale.at_most) < 0.03


def test_the_second_symbol_alone_is_right_for_one_key_of_each() -> None:
    task = Mqar(parts=2, length=112)
    drawn = task.draw(2000, seed=8)
    half = task.shortcuts()["the key's second symbol"]
    assert half.at_most == 0.25 and abs(drawn.accuracy(half.answer(drawn.inputs)) - 0.25) < 0.02


@form
def test_rows_depend_on_seed_and_number_alone(fields: dict[str, Any]) -> None:
    task = Mqar(**fields)
    whole = task.draw(30, seed=9)
    parts = [task.draw(n, seed=9, first=first) for first, n in ((0, 1), (1, 12), (13, 17))]
    assert (np.concatenate([part.inputs for part in parts]) == whole.inputs).all()
    assert (np.concatenate([part.targets for part in parts]) == whole.targets).all()
    assert (task.draw(30, seed=10).inputs != whole.inputs).mean() > 0.5
    assert len({tuple(row) for row in whole.inputs.tolist()}) == 30


def test_the_stream_of_a_seed_stays_what_it_is() -> None:
    drawn = Mqar(pairs=2, symbols=16, length=8).draw(2, seed=0, first=5)
    assert drawn.inputs.tolist() == GOLDEN[0] and drawn.targets.tolist() == GOLDEN[1]


GOLDEN: tuple[list[list[int]], list[list[int]]] = (
    [[2, 15, 1, 10, 2, 2, 1, 2], [7, 15, 5, 14, 5, 5, 5, 5]],
    [[-1, -1, -1, -1, 15, 15, 10, 15], [-1, -1, -1, -1, 14, 14, 14, 14]],
)


def test_longer_rows_hold_more_pairs_of_the_same_symbols() -> None:
    longer = Mqar(rewrites=3).longer(4)
    assert (longer.length, longer.pairs, longer.rewrites, longer.vocab) == (256, 64, 12, 256)
    with pytest.raises(ValueError, match="symbols: 256; 256 pairs need 512 or more"):
        Mqar().longer(16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pairs": 17}, "length: 64; 17 pairs, each asked, need 68 or more"),
        ({"parts": 2}, "length: 64; 16 pairs, each asked, need 112 or more"),
        ({"symbols": 30}, "symbols: 30; 16 pairs need 32 or more"),
        ({"rewrites": 16}, "rewrites: 16 of 16 pairs; accepted: 1 fewer, or less"),
        ({"power": 0.5}, "power: 0.5; dense queries do not read it: leave it out"),
        ({"queries": "some"}, "queries: Input should be 'dense' or 'spaced', not 'some'"),
        ({"pair": 3}, r"pair: unknown field \(did you mean 'pairs'\?\); accepted: length, "),
        ({"pairs": True}, "pairs: expected a number, not True"),
    ],
)
def test_sizes_that_cannot_be_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^task: {message}"):
        validate(Mqar, fields, "task")


def test_tasks_are_found_by_their_files() -> None:
    assert tasks()["mqar"] is task_class("mqar") is Mqar
    with pytest.raises(ValueError, match=r"unknown task 'mqr' \(did you mean 'mqar'\?\); accepted: .*mqar"):
        task_class("mqr")


def test_dice_are_even_and_independent_of_how_rows_are_cut() -> None:
    dice = Dice(2000, 0, "test", 1)
    assert (dice.below("a", 6, 10)[700:] == Dice(1300, 700, "test", 1).below("a", 6, 10)).all()
    counts = np.bincount(dice.below("a", 6, 10).ravel(), minlength=10)
    assert ((counts - 1200) ** 2 / 1200).sum() < 33  # chi-square, 9 degrees of freedom: one in 10^4
    shares = dice.share("b", 6)
    assert shares.min() >= 0 and shares.max() < 1 and abs(shares.mean() - 0.5) < 0.012
    assert abs(np.corrcoef(dice.share("c", 1)[:, 0], shares[:, 0])[0, 1]) < 0.09
    firsts = np.bincount(dice.choose("d", 3, 5)[:, 0], minlength=5)
    assert ((firsts - 400) ** 2 / 400).sum() < 24
    assert all(len(set(row)) == 3 for row in dice.choose("d", 3, 5).tolist())
    with pytest.raises(ValueError, match="rows: 0, first: 0"):
        Dice(0, 0, "test")
    with pytest.raises(ValueError, match="16777216 draws a row; accepted: fewer than"):
        Dice(1, 0, "test").below("many", 1 << 24, 2)


def test_place_in_finds_the_last_one() -> None:
    rows: NDArray[np.int64] = np.asarray([[3, 5, 3, 7], [1, 1, 1, 1]])
    assert place_in(rows, np.asarray([[3, 4, 7], [1, 0, 2]])).tolist() == [[2, -1, 3], [3, -1, -1]]
