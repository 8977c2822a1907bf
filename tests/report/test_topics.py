"""What the page says of measured rows, against rows whose numbers are known by construction."""

from __future__ import annotations

import pytest

from assay.report import render
from assay.report.words import axis, interval, join, kind, shown, title_of, wrapped
from assay.spec.result import Result
from tests.report.conftest import HOSTILE
from tests.report.synthetic import line
from tests.report.test_page import Page, strings

Row = dict[str, object]
Rows = list[Row]


def page(*results: Result) -> Page:
    return Page(render([*results], "t"))


def measured(what: str, rows: Rows, arm: str = "a", seed: int = 0) -> Result:
    return line("measure", "s", arm, seed, values={"what": what, "rows": rows})


def seeds(what: str, make: dict[int, Rows]) -> list[Result]:
    return [measured(what, rows, seed=seed) for seed, rows in make.items()]


def sinks(scale: float) -> Rows:
    """Layer 0 has 1, 2 and layer 1 has 3, 6 times the scale, after 100 and 200 tokens."""
    return [
        {"part": p / 2, "at_tokens": 100 * p, "layer": i, "sink_mass": scale * p * (1 + 2 * i)}
        for p in (1, 2)
        for i in (0, 1)
    ]


def test_a_measurement_during_training_is_drawn_over_tokens_by_layer() -> None:
    found = page(*seeds("training.attention", {0: sinks(0.1), 1: sinks(0.12)}))
    (figure,) = found.figures
    mean, first, second = figure["data"]
    assert [t["x"] for t in (mean, first, second)] == [[100, 200]] * 3
    assert mean["y"] == pytest.approx([0.22, 0.44])
    assert first["y"] == pytest.approx([0.11, 0.22]) and second["y"] == pytest.approx([0.33, 0.66])
    assert mean["error_y"]["array"] == pytest.approx([0.02, 0.04])
    assert [t["visible"] for t in figure["data"]] == [True, False, False]
    assert figure["layout"]["yaxis"]["title"]["text"] == "attention on the first token"
    for said in ("Attention on the first token during training", "mean of layers", "layer 0", "layer 1"):
        assert said in found.text


def test_rows_without_layers_have_no_views() -> None:
    rows: Rows = [{"part": 0.5, "at_tokens": 10, "loss_nats": 2.0}, {"part": 1.0, "at_tokens": 20, "loss_nats": 1.0}]
    (figure,) = page(measured("training.probe", rows)).figures
    assert [(t["x"], t["y"], t["visible"]) for t in figure["data"]] == [([10, 20], [2.0, 1.0], True)]
    assert figure["layout"]["yaxis"]["title"]["text"] == "loss (nats)"


def test_a_column_named_by_a_stranger_is_text_in_the_plot() -> None:
    found = page(measured("training.x", [{"at_tokens": 1, HOSTILE: 2.0}]))
    texts = [s for s in strings(found.figures) if "pwned" in s]
    assert texts and all("<script" not in s and "<img" not in s for s in texts)


def test_recovery_shows_each_variant_before_and_after() -> None:
    rows: Rows = [
        {"variant": v, "tuned": t, "ratio": r, "loss_nats": base * r - t, "last_nats": base}
        for v, base in (("none", 3.0), ("yarn", 2.0))
        for t in (False, True)
        for r in (1, 4)
    ]
    refused: Rows = [{"variant": "ntk", "tuned": True, "ratio": 1, "loss_nats": None, "reason": "refused"}]
    found = page(measured("recovery", rows + refused))
    (figure,) = found.figures
    whole = [t for t in figure["data"] if t["visible"]]
    drawn = {(t["name"], t["line"]["dash"]): (t["x"], t["y"]) for t in whole}
    assert drawn == {
        ("none", "dot"): ([1, 4], [3.0, 12.0]),
        ("none", "solid"): ([1, 4], [2.0, 11.0]),
        ("yarn", "dot"): ([1, 4], [2.0, 8.0]),
        ("yarn", "solid"): ([1, 4], [1.0, 7.0]),
    }
    assert whole[0]["line"]["color"] == whole[1]["line"]["color"] != whole[2]["line"]["color"]
    assert len(figure["data"]) == 8 and "Recovery by fine-tuning" in found.text


def test_a_fit_and_its_cells_are_two_tables_of_means() -> None:
    def rows(seconds: float) -> Rows:
        cells: Rows = [{"batch": b, "context": 128, "seconds": seconds * b, "fitted_s": 2e-3 * b} for b in (1, 8)]
        return [*cells, {"cell": "fit", "r2": 0.97, "seconds_fixed": 5e-4, "state_byte_s": 2.0 * 2**30}]

    text = page(*seeds("decode_fit", {0: rows(1e-3), 1: rows(3e-3)})).text
    assert "arm batch context seconds fitted a 1 128 2.00 ms 2.00 ms a 8 128 16.0 ms 16.0 ms" in text
    assert "arm cell R² seconds fixed rate of reading state a fit 0.970 500 µs 2.00 GiB/s" in text
    assert text.count("Time of a decode step, measured and fitted") == 1


def test_rows_of_a_table_are_averaged_only_over_seeds() -> None:
    same: Rows = [{"busiest": 0.1}, {"busiest": 0.3}]
    assert "arm busiest a 0.100 a 0.300" in page(measured("load", same)).text
    both = seeds("load", {0: same, 1: [{"busiest": 0.2}, {"busiest": 0.4}]})
    assert "arm busiest a 0.150 a 0.350" in page(*both).text


def test_what_few_keys_hold_is_drawn_by_who_chose_them() -> None:
    """A line a method, mean over seeds; the model as it is stands in the table alone."""

    def rows(more: float) -> Rows:
        whole: Row = {"method": "none", "share": 1.0, "keep": 64, "mass": 1.0, "loss_delta_nats": 0.0, "accuracy": None}
        return [
            whole,
            *(
                whole | {"method": m, "share": k / 64, "keep": k, "mass": base * k + more, "loss_delta_nats": 1 / k}
                for m, base in (("oracle", 0.02), ("random", 0.01))
                for k in (8, 16)
            ),
        ]

    found = page(*seeds("sparsity", {0: rows(0.0), 1: rows(0.1)}))
    mass, loss = found.figures
    assert [trace["x"] for trace in mass["data"]] == [[8, 16]] * 2
    assert mass["data"][0]["y"] == pytest.approx([0.21, 0.37]) and mass["data"][1]["y"] == pytest.approx([0.13, 0.21])
    assert loss["data"][0]["y"] == pytest.approx([1 / 8, 1 / 16])
    assert mass["layout"]["yaxis"]["title"]["text"] == "attention that is kept"
    for said in ("What a few keys hold", "Loss without the other keys", "oracle", "random", "none"):
        assert said in found.text


def test_kernels_have_a_view_a_pass_and_a_table_of_slopes() -> None:
    rows: Rows = [{"backend": "naive", "length": n, "seconds": n * 1e-6, "train_seconds": n * 3e-6} for n in (256, 512)]
    fit = {"backend": "naive", "length": None, "seconds": None, "seconds_slope": 1.98}
    found = page(measured("kernels", [*rows, {**fit, "peak_bytes_slope": 2.0}]))
    (figure,) = found.figures
    drawn = [(t["visible"], t["y"]) for t in figure["data"]]
    assert drawn == [(True, [256e-6, 512e-6]), (False, [768e-6, 1536e-6])]
    assert figure["layout"]["yaxis"]["title"]["text"] == "time (s)" and "backward" in found.text
    assert "arm backend seconds slope peak bytes slope a naive 1.980 2.000" in found.text


def test_speeds_with_and_without_a_cache_are_named_apart() -> None:
    rows: Rows = [
        {"batch": 1, "context": n, "cache": cache, "decode_tok_s": speed}
        for cache, speed in (("rows", 90.0), ("none", 30.0))
        for n in (128, 256)
    ]
    (figure,) = page(measured("latency", rows)).figures
    assert [(t["name"], t["y"]) for t in figure["data"]] == [("a", [90, 90]), ("a: no cache", [30, 30])]


@pytest.mark.parametrize("sweep", [True, False])
def test_the_note_of_a_sweep_is_said_once(sweep: bool) -> None:
    study = line("study", "s", values={"arms": [{"name": "a"}], "note": "The optima <b>agree</b>."})
    values = {"learning_rate": [1e-3, 2e-3], "loss_nats": [2.0, 2.1], "optimum": 1e-3}
    found = page(study, *([line("sweep", "s", "a", values=values)] if sweep else []))
    assert found.text.count("The optima <b>agree</b>.") == 1
    assert ("each arm's optimum. The optima" in found.text) is sweep


def test_costs_that_are_alike_are_said_once() -> None:
    runs = [line("trial", "s", a, 0, values={"tokens": 1000, "params_total": n}) for a, n in (("a", 10), ("b", 20))]
    text = page(*runs).text
    assert "The same for every arm, to three digits: tokens 1.00 k." in text and "arm parameters a 10 b 20" in text
    assert "arm parameters tokens a 10 1.00 k" in page(runs[0]).text


def test_an_end_that_misses_zero_does_not_read_as_zero() -> None:
    assert interval(-0.106, -0.2094, -0.0024) == ("−0.106", "−0.209\N{THIN SPACE}to\N{THIN SPACE}−0.002")
    assert interval(0.0, -0.2, 0.2) == ("0.00", "−0.20\N{THIN SPACE}to\N{THIN SPACE}+0.20")


def test_words_for_names_and_lists() -> None:
    assert join(["MQA (1), equal", "GQA", "MHA"]) == "MQA (1), equal; GQA; and MHA"
    assert join(["a", "b", "c"]) == "a, b and c"
    assert axis("entropy_nats") == "entropy (nats)" and kind("sink_mass") == "share"
    assert title_of("latency.itl_ms_p50") == "latency: time between tokens p50"
    assert title_of("latency.decode_tok_s") == "latency: decode speed" and title_of("loss_nats") == "loss"
    assert shown("passkey.accuracy", 0.5) == "50.0%" and shown("memory.state_bytes_measured", 2048) == "2.00 KiB"
    assert shown("repeated_share", 0.625) == "62.5%" and shown("seconds", 0.0123) == "12.3 ms"
    assert wrapped("one two three four five six", 12) == "one two<br>three four …"
    assert wrapped(HOSTILE).count("<") == wrapped(HOSTILE).count("<br>") == 1


def test_a_text_of_white_space_is_described() -> None:
    blank = line("failure", "s", "a", 0, values={"metric": "repeated_share", "score": 1.0, "text": " \n" * 4})
    assert "(8 characters, all of them white space)" in page(blank).text
