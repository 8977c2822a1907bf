"""Cost against context on the page: a view a batch, and from where on an arm is below the base."""

from __future__ import annotations

from assay.report.collect import Point
from assay.report.plots_machine import below
from assay.spec.result import Result
from tests.report.synthetic import line
from tests.report.test_topics import Rows, measured, page

FLAT = {128: 4e-3, 256: 4e-3, 512: 4e-3}
GROWS = {128: 2e-3, 256: 5e-3, 512: 9e-3}
SLOW = dict.fromkeys(GROWS, 1.0)


def rows(times: dict[int, float], batches: tuple[int, ...] = (1,)) -> Rows:
    made: Rows = [{"batch": b, "context": n, "decode_s": t * b} for b in batches for n, t in times.items()]
    return [*made, {"batch": 1, "context": None, "decode_s": None, "phase": "decode", "seconds_slope": 0.75}]


def study(*arms: str) -> Result:
    listed = [{"name": a, "title": a.title()} for a in arms]
    return line("study", "s", values={"arms": listed, "base_arm": arms[0]})


def test_times_are_drawn_by_batch_and_their_crossings_said() -> None:
    runs = [measured("growth", rows(t, (1, 8)), a) for a, t in (("all", GROWS), ("one", FLAT), ("two", SLOW))]
    found = page(study("all", "one", "two"), *runs)
    (figure,) = found.figures
    assert [(t["x"], t["y"]) for t in figure["data"] if t["visible"]] == [
        ([128, 256, 512], list(times.values())) for times in (GROWS, FLAT, SLOW)
    ]
    assert len(figure["data"]) == 6 and figure["layout"]["yaxis"]["title"]["text"] == "time of a step (s)"
    for batch in (1, 8):
        assert f"Batch {batch}, below All: from 256 tokens on One; never Two." in found.text
    assert "arm batch phase seconds slope All 1 decode 0.750" in found.text


def test_without_a_base_nothing_is_said_of_crossings() -> None:
    assert "below" not in page(measured("growth", rows(FLAT))).text


def test_below_for_good() -> None:
    """A line that dips below and comes back is below from its last crossing on; shared contexts alone count."""

    def points(*means: float) -> list[Point]:
        return [Point(float(x), mean, mean, mean, 1) for x, mean in zip((1, 2, 4, 8), means, strict=False)]

    base = {1.0: 1.0, 2.0: 1.0, 4.0: 1.0, 16.0: 1.0}
    assert below(points(0.5, 2.0, 0.5, 9.0), base) == 4
    assert below(points(0.5, 0.5, 0.5), base) == 1
    assert below(points(0.5, 0.5, 1.0), base) is None
