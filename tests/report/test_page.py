"""The page as a file: escaping, what is refused, what is said, what is left out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from assay.report import render, write_report
from assay.spec.result import Result, write_results
from tests.report.conftest import HOSTILE
from tests.report.synthetic import line


class Page(HTMLParser):
    """Tags with their attribute names, the text, and the embedded figures, as a strict HTML reader sees them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.texts: list[str] = []
        self.inside = ""
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def figures(self) -> list[dict[str, Any]]:
        def refuse(name: str) -> float:
            raise AssertionError(f"{name} is not JSON")

        return json.loads(self.scripts[0], parse_constant=refuse)


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


@pytest.fixture(scope="module")
def plain_page(plain: list[Result]) -> Page:
    return Page(render(plain, "A tour"))


@pytest.fixture(scope="module")
def hostile_page(hostile: list[Result]) -> Page:
    return Page(render(hostile, HOSTILE))


def test_hostile_text_adds_no_tag_and_no_attribute(plain_page: Page, hostile_page: Page) -> None:
    assert hostile_page.tags == plain_page.tags
    assert len(hostile_page.scripts) == 3 and "<" not in hostile_page.scripts[0]


def test_hostile_text_is_shown_as_written(hostile_page: Page) -> None:
    assert hostile_page.text.count(" ".join(HOSTILE.split())) > 200


def test_plotly_gets_no_tag_and_no_template_from_data(hostile_page: Page) -> None:
    """Plotly reads <b>, <a>, <br> and %{...} in every text; ours are <br>, <extra> and four named fields."""
    mine = r"</?extra>|<br>|%\{(x|y|z|customdata|customdata\[[01]\]|fullData\.name)(:[^}]*)?\}"
    found = [s for s in strings(hostile_page.figures) if "pwned" in s]
    assert len(found) > 100
    for text in strings(hostile_page.figures):
        rest = re.sub(mine, "", text)
        assert "<" not in rest and "%{" not in rest, text


def test_the_policy_names_exactly_the_scripts(plain: list[Result]) -> None:
    html = render(plain, "A tour")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy and policy[1].count("sha256-") == 2 and "unsafe-inline" not in policy[1].split("style-src")[0]
    assert not re.search(r'(src|href)="https?:', html.split('<script type="application/json"')[0])


@pytest.mark.parametrize("kind", ["trial", "verdict"])
def test_two_recipes_in_one_stage_are_refused(plain: list[Result], kind: str) -> None:
    place = next(i for i, r in enumerate(plain) if r.kind == kind and r.study == "positions")
    mixed = [*plain]
    mixed[place] = plain[place].model_copy(update={"recipe_digest": "another-recipe"})
    with pytest.raises(ValueError, match="positions") as caught:
        render(mixed, "mixed")
    assert "recipe-quick-128" in str(caught.value) and "another-recipe" in str(caught.value)


def test_losses_of_two_recipes_never_share_the_front(plain_page: Page, plain: list[Result]) -> None:
    assert {r.recipe_digest for r in plain if r.kind == "trial"} == {"recipe-quick-128", "recipe-quick-256"}
    fronts = [f for f in plain_page.figures if f["layout"]["xaxis"]["title"]["text"] == "state (bytes/token)"]
    assert len(fronts) == 2
    for figure in fronts:
        is_windows = [any("Window" in s for s in strings(trace)) for trace in figure["data"][1:]]
        assert all(is_windows) or not any(is_windows)


def test_the_headline_counts_what_was_decided(plain_page: Page) -> None:
    assert "10 arms in 5 stages, compared with their baselines over 45 runs" in plain_page.text
    assert "Of the 10 arms, 6 are better, 3 are not distinguishable and 1 was not tested." in plain_page.text
    assert "Of 8 claims written down before the runs, 4 were confirmed, 2 were contradicted" in plain_page.text
    assert "The synthesis takes Rotary (RoPE) and Window 16 on evidence and One head (MQA) as a tie broken by cost" in (
        plain_page.text
    )


def test_the_headline_says_what_the_choice_lost_by(plain_page: Page) -> None:
    """A better loss bought with forgetting is told in the same breath."""
    assert "It is worse in passkey: accuracy (34.0% against 100.0%)." in plain_page.text


def test_an_arm_without_a_verdict_says_not_tested(plain_page: Page) -> None:
    assert re.search(r"Five local to one full ○ not tested – – – – 1\.4\d\d 3", plain_page.text)


def test_kinds_that_are_missing_leave_no_heading() -> None:
    html = render([line("trial", "alone", "only", 0, values={"loss_nats": 1.5})], "Alone")
    for heading in ("Claims", "Synthesis", "Where generation failed", "Learning", "Speed and memory", "Inside"):
        assert f">{heading}" not in html.split("<script")[0]
    assert "1.500" in html


def test_no_results_of_an_empty_value_break_the_page() -> None:
    kinds = ["environment", "study", "trial", "failure", "sweep", "synthesis"]
    results = [line(kind, "s", "a", 0, values={}) for kind in kinds]
    results.append(line("verdict", "s", "b", values={"verdict": "not tested"}))
    results.append(line("claim", "s", values={"outcome": "not tested"}))
    results += [
        line("measure", "s", "a", 0, values={"what": what, "rows": [{}, {"context": None, "batch": "x"}]})
        for what in ("latency", "memory", "kernels", "passkey", "extrapolation", "wavelengths", "new")
    ]
    assert "not tested" in render(results, "Empty")


def test_nan_and_infinity_are_named_and_not_drawn(tmp_path: Path) -> None:
    curve = {"tokens": [1, 2, 3], "loss_nats": [3.0, math.nan, math.inf]}
    values = {"loss_nats": math.nan, "diverged": True, "valid_curve": curve, "train_s": math.inf}
    results = [line("trial", "s", "a", seed, values=values) for seed in (0, 1)]
    infinite = {"metric": "loss_nats", "base_arm": "a", "delta": math.inf, "low": 0.1, "high": math.inf}
    results.append(line("verdict", "s", "b", values={**infinite, "verdict": "worse"}))
    write_results(tmp_path / "results.jsonl", results)
    page = Page(write_report(tmp_path).read_text())
    assert page.figures[0]["data"][0]["x"] == [1.0]
    assert "2 of 2 seeds diverged" in page.text and "∞" in page.text and "▼ worse" in page.text


def test_a_stage_borrows_runs_of_an_equal_spec() -> None:
    trial = line("trial", "first", "x", 0, values={"loss_nats": 1.25}, recipe_digest="r")
    arms = [{"name": "y", "title": "Why", "changes": {}, "spec_digest": trial.spec_digest}]
    study = line("study", "second", values={"arms": arms, "base_arm": "y"}, recipe_digest="r")
    assert re.search(r"Why ● baseline – – – – 1\.250 1", Page(render([trial, study], "t")).text)
    other = study.model_copy(update={"recipe_digest": "other"})
    assert not re.search(r"Why ● baseline – – – – 1\.250 1", Page(render([trial, other], "t")).text)


def test_the_last_line_of_a_kind_wins() -> None:
    first = line("claim", "s", values={"id": "c", "text": "it holds", "outcome": "not tested"})
    second = line("claim", "s", values={"id": "c", "text": "it holds", "outcome": "confirmed"})
    text = Page(render([first, second], "t")).text
    assert text.count("it holds") == 1 and "✓ confirmed" in text


def test_write_report_reads_torn_lines_and_replaces_in_one_step(tmp_path: Path, plain: list[Result]) -> None:
    write_results(tmp_path / "results.jsonl", plain)
    with open(tmp_path / "results.jsonl", "ab") as file:
        file.write(b'{"kind":"trial","study":"posit')
    (tmp_path / "report.html").write_text("old")
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html" and "<h1>A tour of a small decoder</h1>" in path.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "results.jsonl"]


def test_stages_without_a_frame_go_by_the_study_that_ran_them(tmp_path: Path, plain: list[Result]) -> None:
    write_results(tmp_path / "results.jsonl", [r for r in plain if r.study != "tour" or r.kind == "environment"])
    assert "<h1>tour</h1>" in write_report(tmp_path).read_text()


def test_a_refused_report_leaves_the_old_one(tmp_path: Path, plain: list[Result]) -> None:
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(ValueError, match=r"results\.jsonl does not exist"):
        write_report(tmp_path)
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no results"):
        write_report(tmp_path)
    mixed = [line("trial", "s", "a", seed, values={}, recipe_digest=f"r{seed}") for seed in (0, 1)]
    write_results(tmp_path / "results.jsonl", mixed)
    with pytest.raises(ValueError, match="r0 and r1"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"
