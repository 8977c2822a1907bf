"""Plans: what a published law is known to say, the cost of being wrong, and points read from files."""

import json
from pathlib import Path

import numpy as np
import pytest

from assay.cli.main import main
from assay.laws.law import Law
from assay.laws.plan import Known, cost, flops_for, plan, rate_law, shipped
from assay.laws.points import from_rows, read_rows
from assay.spec.result import Result, write_results
from tests.laws.synthetic import TRUE, runs


def test_the_published_laws_say_what_their_papers_say() -> None:
    """Besiroglu et al. 2024, figure 5: about 20 tokens a parameter at Chinchilla's budget; Hoffmann et al. 2022, table
    A3: their law puts 67 B parameters (40 B by equation 4 with the printed constants) at 5.76e23 FLOPs."""
    laws = shipped()
    chinchilla = plan(5.76e23, Known(laws["besiroglu"].law))
    assert 15 < chinchilla["tokens_per_param"] < 25
    assert 60e9 < chinchilla["params"]["value"] < 80e9
    assert plan(5.76e23, Known(laws["chinchilla"].law))["tokens_per_param"] > 50
    n, d = chinchilla["params"]["value"], chinchilla["tokens"]["value"]
    assert 6 * n * d == pytest.approx(5.76e23)
    assert chinchilla["params"]["interval"] is None and chinchilla["regret"] is None


def test_the_cost_of_another_size_is_the_budget_that_buys_its_loss() -> None:
    budget = 1e21
    for factor in (0.25, 3.0):
        found = cost(TRUE, factor * TRUE.best_params(budget), budget)
        less = (1 - found["wasted"]) * budget
        assert TRUE.best_loss(less) == pytest.approx(found["loss_nats"], rel=1e-9)
        assert found["excess_nats"] == pytest.approx(found["loss_nats"] - TRUE.best_loss(budget))
        assert 0 < found["wasted"] < 1
    assert cost(TRUE, TRUE.best_params(budget), budget)["wasted"] == pytest.approx(0.0, abs=1e-6)
    assert flops_for(TRUE, TRUE.best_loss(budget) - 1e-9, budget) == pytest.approx(budget)


def test_intervals_and_regret_are_of_the_draws() -> None:
    draws = tuple(Law(1.8, 480.0, 2000.0, alpha, 0.36) for alpha in np.linspace(0.3, 0.4, 41))
    found = plan(1e20, Known(TRUE, draws, seen=1e19))
    sizes = sorted(law.best_params(1e20) for law in draws)
    low, high = found["params"]["interval"]
    assert sizes[1] < low < sizes[4] and sizes[-5] < high < sizes[-2]
    assert found["beyond"] == pytest.approx(10.0)
    worst = max(law.loss_at(TRUE.best_params(1e20), 1e20) - law.best_loss(1e20) for law in draws)
    assert 0 < found["regret"]["excess_nats_p50"] < found["regret"]["excess_nats_p95"] <= worst
    with pytest.raises(ValueError, match=r"budget: -1\.0; accepted: FLOPs above 0"):
        plan(-1.0, Known(TRUE))


def test_a_power_law_of_rates_is_found() -> None:
    sizes = [1e4, 1e5, 1e6]
    assert rate_law(sizes, [0.5 * n**-0.3 for n in sizes]) == pytest.approx((0.5, -0.3))
    with pytest.raises(ValueError, match="2 or more"):
        rate_law([5.0, 5.0], [1.0, 2.0])


def test_points_are_read_from_a_table_from_lines_and_from_results(tmp_path: Path) -> None:
    points = runs(budgets=3, sizes=3)
    rows = [{"N": n, "D": d, "loss": x} for n, d, x in zip(points.params, points.tokens, points.loss)]
    (tmp_path / "a.csv").write_text(
        "N,D,loss\n" + "".join(f"{r['N']!r},{r['D']!r},{r['loss']!r}\n" for r in _plain(rows))
    )
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in _plain(rows)))
    lines = [
        Result(
            kind="trial",
            study="s",
            arm=str(i),
            seed=0,
            values={"params_total": r["N"], "tokens": r["D"], "loss_nats": r["loss"]},
        )
        for i, r in enumerate(_plain(rows))
    ]
    lost = Result(
        kind="trial", study="s", arm="lost", seed=0, values={"params_total": 5, "tokens": 5, "loss_nats": None}
    )
    write_results(tmp_path / "results.jsonl", [*lines, lost])
    for source in (tmp_path / "a.csv", tmp_path / "b.jsonl", tmp_path):
        found = from_rows(read_rows(source))
        np.testing.assert_allclose(found.loss, points.loss)
        np.testing.assert_allclose(found.flops, points.flops)  # 6 N D where a row says nothing


def _plain(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: float(v) for k, v in row.items()} for row in rows]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"N": 1e6, "D": 1e7}, "run 1: has none of loss_nats, loss, L"),
        ({"N": "many", "D": 1e7, "L": 3.0}, "run 1: N: 'many'; accepted: a number"),
        ({"N": 1e6, "D": float("nan"), "L": 3.0}, "run 1: D: nan; accepted: a finite number"),
        ({"N": 0.0, "D": 1e7, "L": 3.0}, "params: accepted: one number above 0"),
    ],
)
def test_bad_points_are_named(row: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_rows([row])


def test_the_verbs_answer_in_json_and_name_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = runs(noise=0.001, budgets=4, sizes=4)
    rows = [
        f"{n!r},{d!r},{x!r}\n" for n, d, x in zip(*(v.tolist() for v in (points.params, points.tokens, points.loss)))
    ]
    (tmp_path / "runs.csv").write_text("N,D,L\n" + "".join(rows))
    page = tmp_path / "fit.html"
    assert main(["laws", "fit", str(tmp_path / "runs.csv"), "--draws", "0", "--plot", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["runs"] == len(points) and found["held_out"]["worst_miss_nats"] < 0.05
    assert page.stat().st_size > 1_000_000 and "approach 3" in page.read_text()
    assert main(["laws", "fit", str(tmp_path / "runs.csv"), "--draws", "0"]) == 0
    assert "predicted" in capsys.readouterr().out
    assert main(["laws", "plan", "--budget", "1e21", "--json"]) == 0
    per_param = 1e21 / (6 * TRUE.best_params(1e21) ** 2)
    assert json.loads(capsys.readouterr().out)["tokens_per_param"] == pytest.approx(per_param)
    assert main(["laws", "plan", "--budget", "1e21", "--law", "nobody"]) == 2
    assert "accepted: besiroglu, chinchilla" in capsys.readouterr().err
    assert main(["laws", "fit", str(tmp_path / "runs.csv"), "--count", "all"]) == 2
    assert "count 'all'; accepted: total, active" in capsys.readouterr().err
    assert (
        main(["laws", "run", "isoflop", "--out", str(tmp_path / "o"), "--budget", "smoke", "--dry-run", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["left"] == 12
