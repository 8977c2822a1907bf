"""Result and its file: strict JSON on disk, torn writes, errors that name the line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.spec.result import Result, dumps, loads, read_results, write_results

ENVELOPE = ["kind", "study", "arm", "seed", "spec_digest", "recipe_digest", "commit", "version", "device", "threads"]


def trial(seed: int = 0, **values: object) -> Result:
    return Result(kind="trial", study="positions", arm="rope", seed=seed, values=values)


def strict(text: str) -> object:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} in the file")

    return json.loads(text, parse_constant=refuse)


def same(a: object, b: object) -> bool:
    """Equality in which nan equals nan and True is not 1."""
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


text = st.text(st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(text, json_values, max_size=4))
def test_every_json_value_and_every_float_comes_back(values: dict[str, object]) -> None:
    if "$float" in repr(values):
        return
    line = dumps(trial().model_copy(update={"values": values}))
    strict(line)
    assert "\n" not in line
    assert same(loads(line).values, values)


def test_keys_are_the_documented_ones() -> None:
    assert list(json.loads(dumps(trial()))) == [*ENVELOPE, "values"]


def test_nan_text_is_not_taken_for_a_number(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write_results(path, [trial(loss_nats=math.nan, tail=[math.inf, -math.inf], note="nan")])
    strict(path.read_text())
    (back,) = read_results(path)
    assert math.isnan(back.values["loss_nats"])
    assert back.values["tail"] == [math.inf, -math.inf] and back.values["note"] == "nan"


def test_reserved_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\$float"):
        write_results(tmp_path / "r.jsonl", [trial(bad={"$float": 1})])
    assert not (tmp_path / "r.jsonl").exists()


def test_append_keeps_order(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write_results(path, [trial(0), trial(1)])
    write_results(path, [])
    write_results(path, [trial(2)])
    assert [r.seed for r in read_results(path)] == [0, 1, 2]
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("cut", [1, 2, 40, 100])
def test_torn_tail_is_left_out_and_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "results.jsonl"
    write_results(path, [trial(0), trial(1, loss_nats=2.0)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    kept = [0, 1] if cut == 1 else [0]
    assert [r.seed for r in read_results(path)] == kept
    write_results(path, [trial(2)])
    assert [r.seed for r in read_results(path)] == [*kept, 2]
    assert all(strict(line) for line in path.read_text().splitlines())


def test_a_file_that_is_one_torn_line_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(dumps(trial()).encode()[:30] + b"\xff\x00")
    assert read_results(path) == []
    write_results(path, [trial(5)])
    assert [r.seed for r in read_results(path)] == [5]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "trial"', "strict JSON"),
        ('{"kind":"trial","study":"s","values":{"loss_nats":NaN}}', "NaN is not JSON"),
        ('{"kind":"trail","study":"s","values":{}}', "kind"),
        ('{"kind":"trial","study":"s","values":{},"extra":1}', "extra"),
        ('{"kind":"trial","study":"s"}', "values"),
        (
            '{"kind":"verdict","study":"s","values":{"verdict":"good"}}',
            "better, worse, not distinguishable, not tested",
        ),
        ('{"kind":"claim","study":"s","values":{"outcome":"yes"}}', "confirmed, contradicted"),
        ('{"kind":"measure","study":"s","values":{"what":"lens","rows":[1]}}', "list of objects"),
        ('{"kind":"trial","study":"s","values":{"x":{"$float":"nine"}}}', "nine"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(dumps(trial(0)) + "\n" + line + "\n" + dumps(trial(1)) + "\n")
    with pytest.raises(ValueError, match=r"results\.jsonl:2: ") as caught:
        read_results(path)
    assert message in str(caught.value)


def test_nothing_is_written_when_one_result_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write_results(path, [trial(0)])
    with pytest.raises(ValueError):
        write_results(path, [trial(1), trial(2, bad={"$float": 1})])
    assert len(read_results(path)) == 1


def test_no_torch_is_imported() -> None:
    code = "import sys, assay.spec.result, assay.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
