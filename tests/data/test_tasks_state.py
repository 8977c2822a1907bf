"""Tasks that ask for a state after every symbol, against plain loops; groups, brackets and sums are right."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from assay.data.packing import IGNORED
from assay.data.tasks.addition import BLANK, EQUALS, PLUS, Addition
from assay.data.tasks.dyck import Dyck
from assay.data.tasks.majority import Majority
from assay.data.tasks.modular_addition import ModularAddition
from assay.data.tasks.parity import Parity
from assay.data.tasks.word_problem import Group, WordProblem, elements, products

SEEDS = st.integers(0, 10**9)


@given(SEEDS)
def test_parity_sums_and_majority_are_those_of_the_prefix(seed: int) -> None:
    bits = Parity(length=33).draw(4, seed)
    numbers = ModularAddition(length=33, modulus=7).draw(4, seed)
    votes = Majority(length=33).draw(4, seed)
    for row, t in product(range(4), range(33)):
        assert bits.targets[row, t] == sum(bits.inputs[row, : t + 1].tolist()) % 2
        assert numbers.targets[row, t] == sum(numbers.inputs[row, : t + 1].tolist()) % 7
        read = votes.inputs[row, : t + 1].tolist()
        expected = IGNORED if len(read) % 2 == 0 else int(read.count(1) > read.count(0))
        assert votes.targets[row, t] == expected


@pytest.mark.parametrize("window", [1, 9])
def test_how_often_recent_symbols_decide_is_what_counting_all_rows_says(window: int) -> None:
    """All 2^13 rows of 13 bits."""
    rows = np.array(list(product([0, 1], repeat=13)))
    whole = [(2 * rows[:, :n].sum(1) > n) for n in range(1, 14, 2)]
    recent = [(2 * rows[:, max(0, n - window) : n].sum(1) > min(n, window)) for n in range(1, 14, 2)]
    agreed = np.mean([a == b for a, b in zip(whole, recent)])
    name = "last symbol" if window == 1 else f"last {window} symbols"
    assert Majority(length=13).shortcuts()[name].at_most == pytest.approx(agreed, abs=1e-12)


def words(task: Dyck, so_far: tuple[int, ...] = (), likely: float = 1.0) -> Iterator[tuple[tuple[int, ...], float]]:
    """All rows of the task and how likely each is."""
    left, depth = task.length - len(so_far), len(opened(so_far, task.kinds))
    if not left:
        yield so_far, likely
        return
    may_open, may_close = depth < min(task.depth, left), depth > 0
    share = likely / (may_open + may_close)
    for kind in range(task.kinds if may_open else 0):
        yield from words(task, (*so_far, kind), share / task.kinds)
    if may_close:
        yield from words(task, (*so_far, task.kinds + opened(so_far, task.kinds)[-1]), share)


def opened(word: tuple[int, ...], kinds: int) -> list[int]:
    stack: list[int] = []
    for symbol in word:
        stack = [*stack, symbol] if symbol < kinds else stack[:-1]
    return stack


@pytest.mark.parametrize(("length", "kinds", "depth"), [(10, 2, 5), (10, 2, 3), (8, 3, 8), (8, 2, 2)])
def test_how_often_counting_tells_a_bracket_is_what_all_words_say(length: int, kinds: int, depth: int) -> None:
    task = Dyck(length=length, kinds=kinds, depth=depth)
    rows, likely = zip(*words(task), strict=True)
    right = asked = 0.0
    answers = task.shortcuts()["the kind that most are open of"].answer(np.array(rows))
    for row, share, answer in zip(rows, likely, answers.tolist(), strict=True):
        for t in range(length):
            stack = opened(row[: t + 1], kinds)
            if row[t] >= kinds and stack:
                assert answer[t] - kinds == max(range(kinds), key=stack.count)
                asked, right = asked + share, right + share * (answer[t] - kinds == stack[-1])
    assert sum(likely) == pytest.approx(1)
    at_most = task.shortcuts()["the kind that most are open of"].at_most
    assert at_most == pytest.approx(right / asked, abs=1e-12) and (at_most == 1) == (depth == 2)


@pytest.mark.parametrize("group", get_args(Group))
def test_a_group_is_a_group(group: Group) -> None:
    table = products(group)
    order = {"S3": 6, "A5": 60, "S5": 120}[group]
    assert table.shape == (order, order) and len(set(elements(group))) == order
    assert np.array_equal(table[0], np.arange(order)) and np.array_equal(table[:, 0], np.arange(order))
    # Every row and column holds everything once: there are inverses, and cancelling is allowed.
    assert (np.sort(table, 0) == np.arange(order)[:, None]).all() and (np.sort(table, 1) == np.arange(order)).all()
    assert np.array_equal(table[table], table[:, table])  # (a b) c == a (b c)
    assert not np.array_equal(table, table.T)


def test_the_alternating_group_is_even_and_simple() -> None:
    """Determinants are 1; the sizes of its conjugacy classes are 1, 12, 12, 15 and 20 (so no part of it is normal)."""
    identity = np.eye(5)
    assert all(round(np.linalg.det(identity[list(p)])) == 1 for p in elements("A5"))
    table = products("A5")
    inverse = np.argmin(table, 1)
    classes = {frozenset(table[table[g, x], inverse[g]] for g in range(60)) for x in range(60)}
    assert sorted(len(c) for c in classes) == [1, 12, 12, 15, 20]


@given(SEEDS, st.sampled_from(get_args(Group)))
def test_products_are_those_of_the_permutation_matrices(seed: int, group: Group) -> None:
    """Of p q, which maps i to p[q[i]], the matrix is the product of the matrices with a 1 at (p[i], i)."""
    task = WordProblem(length=17, group=group)
    examples = task.draw(2, seed)
    size = len(elements(group)[0])
    for inputs, targets in zip(examples.inputs, examples.targets):
        product_so_far = np.eye(size, dtype=int)
        for symbol, answer in zip(inputs, targets):
            product_so_far = product_so_far @ np.eye(size, dtype=int)[:, list(elements(group)[symbol])]
            assert elements(group)[answer] == tuple(product_so_far.argmax(0).tolist())


@given(SEEDS, st.integers(1, 30), st.integers(2, 5), st.integers(2, 6))
def test_brackets_are_balanced_and_no_deeper_than_allowed(seed: int, half: int, kinds: int, depth: int) -> None:
    task = Dyck(length=2 * half + 2, kinds=kinds, depth=depth)
    examples = task.draw(4, seed)
    for inputs, targets in zip(examples.inputs.tolist(), examples.targets.tolist()):
        text, deepest = "".join(chr(ord("a") + s) if s < kinds else chr(ord("A") + s - kinds) for s in inputs), 0
        level = 0
        for symbol in inputs:
            level += 1 if symbol < kinds else -1
            deepest = max(deepest, level)
            assert level >= 0
        assert level == 0 and deepest <= depth
        for t, target in enumerate(targets):
            left = text[: t + 1]
            while (shorter := _reduced(left, kinds)) != left:
                left = shorter
            asked = inputs[t] >= kinds and left != ""
            assert target == (kinds + ord(left[-1]) - ord("a") if asked else IGNORED)
        while (shorter := _reduced(text, kinds)) != text:
            text = shorter
        assert text == ""


def _reduced(text: str, kinds: int) -> str:
    for kind in range(kinds):
        text = text.replace(chr(ord("a") + kind) + chr(ord("A") + kind), "")
    return text


def test_depths_are_used_and_kinds_are_even() -> None:
    task = Dyck(length=128, kinds=3, depth=4)
    inputs = task.draw(2000, 1).inputs
    levels = np.cumsum(np.where(inputs < 3, 1, -1), 1)
    assert set(np.unique(levels)) == {0, 1, 2, 3, 4}
    opened = np.bincount(inputs[inputs < 3])
    assert stats.chisquare(opened).pvalue > 1e-3
    # Away from the end a coin decides between the borders: half of the brackets at levels 1 to 3 open.
    inner = inputs[:, 1:64][(levels[:, :63] > 0) & (levels[:, :63] < 4)] < 3
    assert inner.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(inner.size))


@given(SEEDS, st.integers(1, 25), st.integers(0, 30))
def test_sums_add_up(seed: int, least: int, spare: int) -> None:
    task = Addition(length=3 * least + 2 + spare, least=least)
    examples = task.draw(4, seed)
    for inputs, targets in zip(examples.inputs.tolist(), examples.targets.tolist()):
        equals = inputs.index(EQUALS)
        a, b = ("".join(map(str, inputs[p:q][::-1])) for p, q in ((0, inputs.index(PLUS)), (len_a(inputs) + 1, equals)))
        assert least <= len(a) == len(b) <= task.most
        answer = [t for t in targets if t != IGNORED]
        assert int("".join(map(str, answer[::-1]))) == int(a) + int(b)
        # One digit is due at the mark, the others behind the digit before; then the row is blank.
        assert [t == IGNORED for t in targets] == [not equals <= i <= equals + len(a) for i in range(task.length)]
        assert inputs[equals + 1 :] == (answer + [BLANK] * task.length)[: task.length - equals - 1]


def test_what_guessing_and_not_carrying_reach_is_what_all_sums_say() -> None:
    """Numbers of one or two digits, as often each: all pairs of both sizes."""
    zeros, dry, asked = 0.0, 0.0, 0.0
    for n in (1, 2):
        pairs = list(product(range(10**n), repeat=2))
        for a, b in pairs:
            due = [(a + b) // 10**i % 10 for i in range(n + 1)]
            without = [(a // 10**i % 10 + b // 10**i % 10) % 10 for i in range(n + 1)]
            zeros += due.count(0) / len(pairs)
            dry += sum(x == y for x, y in zip(due, without)) / len(pairs)
            asked += len(due) / len(pairs)
    task = Addition(length=8)
    assert task.floor == pytest.approx(zeros / asked, abs=1e-12)
    assert task.shortcuts()["without carrying"].at_most == pytest.approx(dry / asked, abs=1e-12)


def len_a(inputs: list[int]) -> int:
    return inputs.index(PLUS)


def test_sums_have_all_lengths_and_go_on_beyond_them() -> None:
    task = Addition()
    digits = (task.draw(3000, 1).asked.sum(1) - 1).tolist()
    assert set(digits) == set(range(1, 11)) and stats.chisquare(np.bincount(digits)[1:]).pvalue > 1e-3
    longer = (task.longer(2).draw(300, 1).asked.sum(1) - 1).tolist()
    assert set(longer) == set(range(11, 21))
