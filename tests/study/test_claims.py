"""Claims: what is parsed and refused, and outcomes against scipy's own tests on the same numbers."""

import math

import numpy as np
import pytest
from scipy import stats

from assay.spec.result import Result
from assay.study.claims import arms, parse
from assay.study.evidence import Evidence, lower_is_better
from assay.study.judge import Court, claim_results, judge, verdict_results
from assay.study.statistics import Metric

BAD = [
    ("__import__('os').system('true')", "is not a test"),
    ("mean(loss_nats, arm=a)", "is not a test"),
    ("mean(loss_nats) < 2", "arm=NAME"),
    ("mean(loss_nats, arm=a) == 2", "use equivalent"),
    ("mean(loss_nats, arm=a) < max(3, 4)", "is not a value"),
    ("mean(loss_nats, arm=a) in 3", "accepted comparisons"),
    ("mean(a.b.c, arm=a) < 3", "is not a metric"),
    ("mean(loss_nats, **{'arm': 'a'}) < 3", "not accepted"),
    ("mean(loss_nats, arm=a) ** 2 < 3", "is not a value"),
    ("mean(loss_nats, arm=a) < True", "is not a value"),
    ("verdict(loss_nats, arm=a) == great", "better, worse"),
    ("verdict(loss_nats, arm=a) < better", "better, worse"),
    ("equivalent(mean(loss_nats, arm=a), 2)", "within"),
    ("equivalent(mean(loss_nats, arm=a), 2, within=-1)", "above zero"),
    ("1 < 2", "names no arm"),
    ("mean(loss_nats, arm=a) <", "not a test"),
    ("not (mean(loss_nats, arm=a) < 2)", "is not a test"),
    ("(" * 300 + ")" * 300, "at most"),
    ("mean(x, arm=[a for a in ()]) < 1", "a word, a number"),
    ("correlation(loss_nats) < 0", "metric, metric"),
    ("correlation(loss_nats, tokens) <= 0", "metric, metric"),
    ("correlation(loss_nats, tokens) < -1", "between -1 and 1"),
    ("0 < correlation(loss_nats, tokens)", "is not a value"),
]


@pytest.mark.parametrize("text,message", BAD)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        parse(text)


def test_arms_are_found_everywhere() -> None:
    text = (
        "verdict(x, arm=a, base=b) == better and mean(y.z, arm='5:1', ratio=8) < 1.1 * mean(y, arm=d) - exact(p, arm=e)"
    )
    assert arms(parse(text)) == {"a", "b", "5:1", "d", "e"}


LOSS = {
    "base": [2.00, 2.02, 1.98, 2.01],
    "low": [1.80, 1.83, 1.77, 1.81],
    "same": [2.01, 2.01, 1.98, 2.02],
    "wild": [1.7, 2.4, 1.9, 2.2],
    "few": [1.80, 1.82],
    "lone": [1.8],
}
BYTES = {"base": 512, "low": 128, "same": 512, "wild": 512, "few": 512, "lone": 512}
BY_RATIO = {"base": 0.9, "low": 0.01}


def _results(study: str = "s") -> list[Result]:
    out = []
    for arm, losses in LOSS.items():
        for seed, loss in enumerate(losses):
            values = {"loss_nats": loss, "state_bytes_per_token": BYTES[arm], "diverged": False}
            out.append(Result(kind="trial", study=study, arm=arm, seed=seed, values=values))
            gain = BY_RATIO.get(arm, 0.5)
            rows = [{"variant": "none", "ratio": r, "loss_nats": loss + gain * math.log2(r)} for r in (1, 2, 8)]
            rows += [{"variant": "yarn", "ratio": 8, "loss_nats": loss}]
            values = {"what": "extrapolation", "rows": rows}
            out.append(Result(kind="measure", study=study, arm=arm, seed=seed, values=values))
    return out


EVIDENCE = Evidence(_results(), "s")
COURT = Court("base", tuple(LOSS))

OUTCOMES = [
    ("verdict(loss_nats, arm=low) == better", "confirmed"),
    ("verdict(loss_nats, arm=low) == worse", "contradicted"),
    ("verdict(loss_nats, arm=same) == better", "not distinguishable"),
    ("verdict(loss_nats, arm=base, base=low) == worse", "confirmed"),
    ("verdict(loss_nats, arm=lone) == better", "not tested"),
    ("verdict(loss_nats, arm=few) == better", "confirmed"),
    ("verdict(loss_nats, arm=absent) == better", "not tested"),
    ("verdict(recall.accuracy, arm=low) == better", "not tested"),
    ("verdict(extrapolation.loss_nats, arm=low, ratio=8, variant=none) == better", "confirmed"),
    ("mean(loss_nats, arm=low) < mean(loss_nats, arm=base)", "confirmed"),
    ("mean(loss_nats, arm=low) > mean(loss_nats, arm=base)", "contradicted"),
    ("mean(loss_nats, arm=few) < mean(loss_nats, arm=base)", "confirmed"),
    ("mean(loss_nats, arm=wild) < mean(loss_nats, arm=base)", "not distinguishable"),
    ("mean(loss_nats, arm=lone) < mean(loss_nats, arm=base)", "not tested"),
    ("mean(loss_nats, arm=low) < 1.9", "confirmed"),
    ("1.9 <= mean(loss_nats, arm=low)", "contradicted"),
    ("1.7 < mean(loss_nats, arm=low) < 1.9", "confirmed"),
    ("mean(loss_nats, arm=low) < 1.9 and mean(loss_nats, arm=absent) < 9", "not tested"),
    ("mean(loss_nats, arm=low) < 1.9 and mean(loss_nats, arm=wild) < 2", "not distinguishable"),
    ("mean(loss_nats, arm=low) > 1.9 and mean(loss_nats, arm=absent) < 9", "contradicted"),
    (
        "mean(extrapolation.loss_nats, arm=low, ratio=8, variant=none)"
        " <= 1.1 * mean(extrapolation.loss_nats, arm=low, ratio=1)",
        "confirmed",
    ),
    (
        "mean(extrapolation.loss_nats, arm=base, ratio=8, variant=none)"
        " <= 1.1 * mean(extrapolation.loss_nats, arm=base, ratio=1)",
        "contradicted",
    ),
    ("equivalent(mean(loss_nats, arm=same), mean(loss_nats, arm=base), within=0.05)", "confirmed"),
    ("equivalent(mean(loss_nats, arm=low), mean(loss_nats, arm=base), within=0.05)", "contradicted"),
    ("equivalent(mean(loss_nats, arm=same), mean(loss_nats, arm=base), within=0.0005)", "not distinguishable"),
    # Close on average and wide: no evidence of equality.
    ("equivalent(mean(loss_nats, arm=wild), mean(loss_nats, arm=base), within=0.1)", "not distinguishable"),
    ("exact(state_bytes_per_token, arm=low) == exact(state_bytes_per_token, arm=base) / 4", "confirmed"),
    ("exact(state_bytes_per_token, arm=lone) < 512", "contradicted"),
    ("exact(loss_nats, arm=low) < 2", "not tested"),
    ("mean(loss_nats, arm=low) / 0 < 2", "not tested"),
]


@pytest.mark.parametrize("text,outcome", OUTCOMES)
def test_outcomes(text: str, outcome: str) -> None:
    found, sentence = judge(parse(text), EVIDENCE, COURT)
    assert found == outcome, sentence
    assert sentence.endswith(".") and len(sentence) > 10


def test_the_sentence_has_scipys_interval() -> None:
    _, sentence = judge(parse("mean(loss_nats, arm=low) < mean(loss_nats, arm=same)"), EVIDENCE, COURT)
    low, high = stats.ttest_ind(LOSS["low"], LOSS["same"]).confidence_interval(0.95)
    assert f"({low:+.4g} to {high:+.4g})" in sentence and "4 seeds" in sentence


def test_an_arm_at_two_lengths_is_compared_seed_by_seed() -> None:
    text = "mean(extrapolation.loss_nats, arm=wild, ratio=2) < mean(extrapolation.loss_nats, arm=wild, ratio=1)"
    # The arm's seeds differ by 0.7, its own gain by nothing: only a paired test can tell.
    assert judge(parse(text), EVIDENCE, COURT)[0] == "contradicted"


def test_false_confirmations_stay_within_alpha() -> None:
    rng, wrong, studies = np.random.default_rng(3), 0, 500
    test = parse("mean(loss_nats, arm=a) < mean(loss_nats, arm=b)")
    for _ in range(studies):
        results = [
            Result(kind="trial", study="s", arm=arm, seed=seed, values={"loss_nats": 2 + 0.03 * rng.normal()})
            for arm in "ab"
            for seed in range(3)
        ]
        wrong += judge(test, Evidence(results, "s"), Court("b", ("a", "b")))[0] != "not distinguishable"
    assert wrong <= stats.binom.ppf(0.999, studies, 0.05)


def test_a_diverged_run_has_sizes_and_no_loss() -> None:
    values = {"loss_nats": 3.0, "params_total": 10, "diverged": True}
    results = [Result(kind="trial", study="s", arm="a", seed=s, values=values) for s in (0, 1)]
    evidence = Evidence(results, "s")
    assert evidence.samples("params_total", "a") == {0: 10.0, 1: 10.0}
    assert all(math.isnan(v) for v in evidence.samples("loss_nats", "a").values())
    outcome, sentence = judge(parse("mean(loss_nats, arm=a) < 4"), evidence, COURT)
    assert outcome == "not tested" and "diverged" in sentence


def test_another_studys_rows_are_not_read() -> None:
    assert Evidence(_results("other"), "s").arms() == []


def test_directions() -> None:
    assert [lower_is_better(m) for m in ("loss_nats", "passkey.accuracy", "decode_tok_s", "ttft_s", "mfu")] == [
        True,
        False,
        False,
        True,
        False,
    ]


def test_lines_for_the_report() -> None:
    about = Result(kind="study", study="s", values={}, version="0.1.0", recipe_digest="ab")
    lines = {r.arm: r for r in verdict_results(EVIDENCE, COURT, about)}
    assert "base" not in lines and lines["low"].values["verdict"] == "better"
    assert lines["low"].values["noise"] == pytest.approx(np.std(LOSS["base"], ddof=1))
    assert lines["lone"].values["verdict"] == "not tested" and lines["low"].recipe_digest == "ab"
    assert lines["low"].values["p_holm"] >= lines["low"].values["p"]
    claim = {"id": "c", "text": "t", "source": "x", "test": OUTCOMES[0][0]}
    (line,) = claim_results(EVIDENCE, COURT, [claim], about)
    assert line.kind == "claim" and line.values["outcome"] == "confirmed" and line.values["source"] == "x"


def test_the_studys_smallest_effect_of_interest_counts_in_its_own_metric() -> None:
    court = Court("base", tuple(LOSS), Metric("loss_nats", interest=0.5))
    assert judge(parse("verdict(loss_nats, arm=low) == better"), EVIDENCE, court)[0] == "not distinguishable"


def ranked(scores: list[float], losses: list[float]) -> tuple[Evidence, Court]:
    """Arms a, b, ... with two seeds each, and one measured score."""
    out = []
    for i, (score, loss) in enumerate(zip(scores, losses, strict=True)):
        for seed in (0, 1):
            told = {"loss_nats": loss + seed, "diverged": False}
            rows = [{"task": "recall", "accuracy": score}, {"task": "other", "accuracy": -score}]
            about = {"study": "s", "arm": chr(97 + i), "seed": seed}
            out.append(Result(kind="trial", values=told, **about))
            out.append(Result(kind="measure", values={"what": "probe", "rows": rows}, **about))
    return Evidence(out, "s"), Court("a", tuple(chr(97 + i) for i in range(len(scores))))


def test_correlations_are_by_ranks_over_arms() -> None:
    """Rho is scipy's; a monotone map changes nothing; the interval is Fisher's z with Bonett and Wright's error."""
    scores, losses = [1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10], [9.0, 10, 8, 7, 6, 5, 4, 3, 1, 2]
    for shape in (scores, [math.exp(x) for x in scores]):
        outcome, said = judge(
            parse("correlation(loss_nats, probe.accuracy, task=recall) < -0.5"), *ranked(shape, losses)
        )
        rho = stats.spearmanr(scores, losses).statistic
        reach = 1.959964 * math.sqrt((1 + rho**2 / 2) / 7)
        low, high = np.tanh(np.arctanh(rho) + np.array([-reach, reach]))
        assert outcome == "confirmed"
        assert said == f"rank correlation {rho:+.2f} ({low:+.2f} to {high:+.2f}) over 10 arms."
    other = parse("correlation(loss_nats, probe.accuracy, task=other) < 0")
    assert judge(other, *ranked(scores, losses))[0] == "contradicted"


def test_few_arms_have_no_correlation() -> None:
    """Nor have arms that are all alike, and one that diverged is left out."""
    test = parse("correlation(loss_nats, probe.accuracy, task=recall) < 0")
    assert judge(test, *ranked([1.0, 2, 3, 4], [4.0, 3, 2, 1]))[0] == "not tested"
    assert judge(test, *ranked([1.0] * 6, [6.0, 5, 4, 3, 2, 1]))[0] == "not tested"
    outcome, said = judge(test, *ranked([1.0, 2, 3, 4, 5, 6], [6.0, 5, 4, 3, 2, math.nan]))
    assert (outcome, said.endswith("over 5 arms.")) == ("confirmed", True)


def test_unrelated_arms_are_seldom_called_related() -> None:
    """Of 400 draws of 15 unrelated arms, about 5 % are confirmed or contradicted at a level of 5 %."""
    drawn = np.random.default_rng(0).normal(size=(400, 2, 15))
    test = parse("correlation(loss_nats, probe.accuracy, task=recall) < 0")
    called = [judge(test, *ranked(*pair.tolist()))[0] != "not distinguishable" for pair in drawn]
    assert 0.02 < np.mean(called) < 0.085
