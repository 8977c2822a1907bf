"""Passkey documents: exact lengths and distances, an oracle that is always right, and what guessing reaches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.data.tasks.passkey import Example, Passkey, accuracy

TASKS = [
    Passkey(),
    Passkey.short(),
    Passkey(digits=2, alphabet="XYZ", statement="K=", end="", filler="ab", asks=3, answer_only=True),
]


@given(st.sampled_from(TASKS), st.integers(64, 300), st.integers(0, 10**9), st.data())
def test_a_document_is_what_was_asked_for(task: Passkey, length: int, key: int, data: st.DataObject) -> None:
    distance = data.draw(st.sampled_from(task.distances(length)))
    example = task.example(length, key, distance)
    tokens = [*example.prompt.tolist(), *example.answer.tolist()]
    text = bytes(tokens).decode()
    answer = bytes(example.answer.tolist()).decode()
    assert len(text) == length and len(answer) == task.digits
    assert text.endswith(task.statement + answer)
    assert text.count(task.statement) == 2
    told = text.index(task.statement) + len(task.statement)
    assert text[told:].startswith(answer + task.end)
    assert (length - task.digits) - told == example.distance == distance
    assert task.solve(example.prompt).tolist() == example.answer.tolist()
    around = (
        text[: told - len(task.statement)],
        text[told + task.digits + len(task.end) : length - len(task.statement + answer)],
    )
    assert all(part in task.filler * (2 + length // len(task.filler)) for part in around)


@given(st.sampled_from(TASKS), st.integers(64, 300), st.integers(0, 10**9))
def test_a_training_document_only_adds_questions_with_the_same_answer(task: Passkey, length: int, key: int) -> None:
    example = task.example(length, key)
    tokens, counted = task.draw(length, key)
    text, answer = bytes(tokens.tolist()).decode(), bytes(example.answer.tolist()).decode()
    assert len(tokens) == len(counted) == length and text.endswith(answer)
    questions = text.split(task.statement)[1:]
    assert 2 <= len(questions) <= 1 + task.asks
    assert all(question.startswith(answer) for question in questions)
    if task.answer_only:
        # All keys but the first, which nothing before it tells.
        places = [i for i in range(length) if text.startswith(task.statement + answer, i)][1:]
        expected = {i + len(task.statement) + k for i in places for k in range(task.digits)}
        assert set(np.flatnonzero(counted).tolist()) == expected
    else:
        assert counted.all()


def test_further_questions_are_halved_and_stand_anywhere() -> None:
    task = Passkey.short()
    texts = [bytes(task.draw(256, key)[0].tolist()).decode() for key in range(4000)]
    asked = [[i for i in range(256) if text[i] == "#"] for text in texts]
    # All eight fit where the last question is this far from the statement.
    counts = [len(places) - 1 for places in asked if places[-1] - places[0] > 64]
    tally = np.array([counts.count(n) for n in (1, 2, 4, 8)])
    expected = len(counts) / 4
    # Fair draws exceed these once in a thousand (3 and 9 degrees of freedom).
    assert tally.sum() == len(counts) > 2000
    assert ((tally - expected) ** 2 / expected).sum() < 16.3
    # Where the one between stands in its room: from 3 after the statement to 3 before the last question.
    shares = [(b - a - 3) / (c - a - 5) for a, b, c in (p for p in asked if len(p) == 3 and p[2] - p[0] > 64)]
    tenths = np.histogram(shares, bins=10, range=(0, 1))[0]
    assert ((tenths - len(shares) / 10) ** 2 / (len(shares) / 10)).sum() < 27.9


def test_keys_and_distances_are_drawn_evenly() -> None:
    task = Passkey.short()
    examples = [task.example(64, key) for key in range(4000)]
    keys = np.bincount([int(e.answer[0]) - ord("0") for e in examples], minlength=10)
    # Fair draws exceed these once in a thousand (9 and 59 degrees of freedom).
    assert ((keys - 400) ** 2 / 400).sum() < 27.9
    possible = task.distances(64)
    counts = np.bincount([e.distance for e in examples])[possible[0] :]
    expected = 4000 / len(possible)
    assert len(possible) == 60 and len(counts) == 60
    assert ((counts - expected) ** 2 / expected).sum() < 98.3


def test_accuracy_against_the_oracle_and_against_guessing() -> None:
    task = Passkey.short()
    examples = [task.example(64, key) for key in range(2000)]
    assert accuracy(examples, [task.solve(e.prompt) for e in examples]) == 1.0
    guess = accuracy(examples, [[ord("3")]] * 2000)
    assert abs(guess - task.chance) < 4 * np.sqrt(0.1 * 0.9 / 2000)
    assert Passkey().chance == 1e-5
    half_right = Example(np.array([1]), np.array([5, 6]), 1)
    assert accuracy([half_right], [[5, 7]]) == 0.0


@pytest.mark.parametrize("length", [64, 101])
@pytest.mark.parametrize("task", TASKS)
def test_shortcuts_reach_what_they_claim_and_no_more(task: Passkey, length: int) -> None:
    """Exactly as much, so that a score is above them all or has not shown that anything was found."""
    examples = [task.example(length, key) for key in range(2000)]
    prompts = np.stack([e.prompt for e in examples])
    shortcuts = task.shortcuts(length)
    assert ("its first symbol alone" in shortcuts) == (task.digits > 1)
    for name, shortcut in shortcuts.items():
        reached, expected = accuracy(examples, list(shortcut.answer(prompts))), shortcut.at_most
        assert reached == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 2000)), name
        assert reached < 0.75 and expected < 0.75, name


@pytest.mark.parametrize("task", TASKS)
def test_the_nearer_half_finds_a_key_as_far_as_it_sees(task: Passkey) -> None:
    near = task.shortcuts(64)["the nearer half"]
    for distance in task.distances(64):
        examples = [task.example(64, key, distance) for key in range(50)]
        prompts = np.stack([e.prompt for e in examples])
        prompts[:, : 64 - task.digits - 32] = 0  # nothing is read there
        found = accuracy(examples, list(near.answer(prompts)))
        assert found == 1.0 if distance <= 32 else found < 0.5


def test_shortcuts_know_their_length() -> None:
    with pytest.raises(ValueError, match="length: 4; a passkey document needs 5 tokens or more"):
        Passkey.short().shortcuts(4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alphabet": "é1"}, "accepted: ASCII"),
        ({"alphabet": "11"}, "repeats a symbol"),
        ({"filler": "page 1 "}, "stands in the statement, end or filler too"),
        ({"statement": "is green"}, "stands in the filler too"),
        ({"statement": "ba", "filler": "ab"}, "stands in the filler too"),
        ({"statement": "aa", "filler": "a b "}, "where filler meets it"),
        ({"statement": "; T", "end": ";", "filler": " T."}, "where filler meets it"),
        ({"digits": 0}, "greater than or equal to 1"),
    ],
)
def test_bad_tasks(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Passkey.model_validate(fields)


def test_what_does_not_fit() -> None:
    task = Passkey.short()
    assert task.distances(5) == range(3, 4)
    with pytest.raises(ValueError, match="length: 4; a passkey document needs 5 tokens or more"):
        task.example(4, 0)
    with pytest.raises(ValueError, match="distance: 63; accepted at length 64: 3 to 62"):
        task.example(64, 0, 63)
