"""Readers of public shapes with what they refuse, and drawn traces with what they promise."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from assay.simulate.generate import NAMES, generate
from assay.simulate.trace import BLOCK, Arrival, at_rate, rate_of, read_trace

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def csv(folder: Path, *rows: str, head: str = HEAD) -> Path:
    path = folder / "trace.csv"
    path.write_text(head + "".join(f"{row}\n" for row in rows))
    return path


def jsonl(folder: Path, *rows: object) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_azures_shape(tmp_path: Path) -> None:
    """Seven digits of a second, lines ended as on Windows, and not in order."""
    path = csv(tmp_path, "2023-11-16 18:15:50.9951690,2162,5\r", "2023-11-16 18:15:46.6805900,374,44\r")
    first, second = read_trace(path)
    assert first == Arrival(0.0, 374, 44)
    assert (second.prompt, second.new) == (2162, 5) and second.at == pytest.approx(4.314579, abs=2e-6)


def test_mooncakes_shape(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 27_482, "input_length": 6955, "output_length": 52, "hash_ids": list(range(46, 60))},
        {"timestamp": 30_535, "input_length": 500, "output_length": 26, "hash_ids": [46]},
    ]
    first, second = read_trace(jsonl(tmp_path, *rows))
    assert first == Arrival(0.0, 6955, 52, tuple(range(46, 60)))
    assert second.at == pytest.approx(3.053) and second.blocks == (46,)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ("yesterday,5,5", "TIMESTAMP: 'yesterday'"),
        ("2023-11-16 18:15:46,0,5", "ContextTokens: '0'"),
        ("2023-11-16 18:15:46,5,many", "GeneratedTokens: 'many'"),
        ("2023-11-16 18:15:46,5", "GeneratedTokens: None"),
    ],
)
def test_a_bad_row_is_named_by_line_and_field(tmp_path: Path, row: str, field: str) -> None:
    path = csv(tmp_path, "2023-11-16 18:15:46,5,5", row)
    with pytest.raises(ValueError) as error:
        read_trace(path)
    assert f"{path}: line 3: {field}; accepted: " in str(error.value)


GOOD = {"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "list; accepted: one object"),
        ({**GOOD, "timestamp": -1}, "timestamp: -1"),
        ({**GOOD, "timestamp": True}, "timestamp: True"),
        ({**GOOD, "input_length": 1.5}, "input_length: 1.5"),
        ({**GOOD, "output_length": 0}, "output_length: 0"),
        ({**GOOD, "hash_ids": "12"}, "hash_ids: 12"),
        ({**GOOD, "hash_ids": [1, 2, 3]}, "hash_ids: 3 of them"),
    ],
)
def test_a_bad_line_is_named_by_number_and_field(tmp_path: Path, row: object, words: str) -> None:
    path = jsonl(tmp_path, GOOD, "", row)
    with pytest.raises(ValueError) as error:
        read_trace(path)
    assert f"{path}: line 3: {words}" in str(error.value) and "accepted: " in str(error.value)


def test_files_of_no_known_shape_are_refused(tmp_path: Path) -> None:
    for head, words in (("a,b\n", "no column TIMESTAMP"), (HEAD, "no requests")):
        with pytest.raises(ValueError, match=words):
            read_trace(csv(tmp_path, head=head))
    with pytest.raises(ValueError, match=r"accepted: \.csv"):
        read_trace(tmp_path / "trace.txt")
    (tmp_path / "trace.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_trace(tmp_path / "trace.csv")


@pytest.mark.parametrize(
    ("name", "prompt", "new"), [("code", (1469, 2048), (13, 27.9)), ("conversation", (1020, 1155), (129, 211))]
)
def test_drawn_lengths_have_the_published_medians_and_means(
    name: str, prompt: tuple[float, float], new: tuple[float, float]
) -> None:
    trace = generate(name, 20_000, 5.0, 0)
    for values, (median, mean) in (([one.prompt for one in trace], prompt), ([one.new for one in trace], new)):
        assert np.median(values) == pytest.approx(median, rel=0.05)
        assert np.mean(values) == pytest.approx(mean, rel=0.06)


@pytest.mark.parametrize("cv", [1.0, 3.0])
def test_arrivals_have_their_rate_and_their_bursts(cv: float) -> None:
    times = [one.at for one in generate("code", 40_000, 5.0, 0, cv)]
    gaps = np.diff(times)
    assert times[0] == 0.0 and gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_conversations_repeat_what_was_said() -> None:
    """A chain of equal numbers is a shared beginning: later turns go on from it, and only system prompts are shared."""
    trace = generate("sessions", 400, 2.0, 0)
    assert [one.at for one in trace] == sorted(one.at for one in trace)
    follows: dict[int, set[int]] = {}
    for one in trace:
        assert len(one.blocks) == -(-one.prompt // BLOCK) == len(set(one.blocks))
        for before, after in pairwise((-1, *one.blocks)):
            follows.setdefault(after, set()).add(before)
    assert all(len(before) == 1 for before in follows.values()), "a number stands for all before it too"
    starts = {one.blocks[0] for one in trace}
    assert len(starts) == 8, "the system prompts"
    later = [one for one in trace if len(one.blocks) > 4]
    talks = {one.blocks[3] for one in later}
    assert len(talks) < len(later) / 2, "turns of one conversation share more than the system prompt"


def test_the_seed_alone_decides() -> None:
    for name in NAMES:
        assert generate(name, 50, 1.0, 3) == generate(name, 50, 1.0, 3) != generate(name, 50, 1.0, 4)
    for bad in ({"count": 0}, {"rate": 0.0}, {"cv": -1.0}, {"seed": -1}, {"name": "poems"}):
        with pytest.raises(ValueError, match="accepted: "):
            generate(**{"name": "code", "count": 5, "rate": 1.0, "seed": 0, **bad})  # type: ignore[arg-type]


def test_another_rate_stretches_all_gaps_alike() -> None:
    trace = generate("sessions", 50, 1.0, 0)
    faster = at_rate(trace, 8.0)
    assert rate_of(faster) == pytest.approx(8.0)
    ratio = np.diff([one.at for one in trace]) / np.diff([one.at for one in faster])
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
    assert [one.blocks for one in faster] == [one.blocks for one in trace]
    with pytest.raises(ValueError, match="rate: "):
        at_rate(trace, 0.0)
    with pytest.raises(ValueError, match="come at once"):
        at_rate([Arrival(0.0, 1, 1)] * 2, 1.0)
