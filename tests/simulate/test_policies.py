"""What policies do to latency and throughput, against closed forms where there are any."""

from __future__ import annotations

import numpy as np
import pytest

from assay.simulate.cost import StepCost
from assay.simulate.generate import generate
from assay.simulate.goodput import Slo, goodput, summary
from assay.simulate.run import simulate
from assay.simulate.trace import Arrival, at_rate
from tests.simulate.cases import GPU, fleet, machine, whole


@pytest.mark.parametrize("batch", [4, 16])
def test_static_batches_take_the_longest_reply_and_continuous_ones_the_mean(batch: int) -> None:
    """Steps of one length, everybody there from the start: a static batch takes its longest reply, and continuous
    batching makes `batch` tokens a step until few are left (Yu et al. 2022, section 3)."""
    new = np.random.default_rng(0).geometric(1 / 40, 40 * batch)
    trace = [Arrival(0.0, 1, int(n)) for n in new]
    steps = machine(StepCost(overhead=1.0))
    static = simulate(trace, steps, fleet("static", 4096, batch)).end
    assert static == pytest.approx(new.reshape(-1, batch).max(1).sum(), rel=1e-9)
    running = simulate(trace, steps, fleet("chunked", 4096, batch)).end
    tail = new.max()  # at most: the last ones run in a batch that is no longer full
    assert new.sum() / batch <= running <= new.sum() / batch + tail
    assert static / running == pytest.approx(new.reshape(-1, batch).max(1).mean() / new.mean(), rel=0.12)


@pytest.mark.parametrize("budget", [256, 512, 2048])
def test_no_gap_between_tokens_is_longer_than_a_full_step(budget: int) -> None:
    trace = generate("conversation", 120, 5.0, 0)
    run = simulate(trace, machine(), fleet("chunked", budget))
    longest, running = max(one.prompt + one.new for one in trace), 60
    step = GPU.overhead + max(GPU.weights, GPU.token * budget) + GPU.context * longest * running
    step += GPU.pair * budget * longest
    assert max(max(one.gaps, default=0.0) for one in run.served) <= step


def test_chunks_bound_the_gap_and_whole_prompts_do_not() -> None:
    trace = generate("conversation", 150, 6.0, 0)
    slo = Slo()
    found = {n: summary(simulate(trace, machine(), fleet("chunked", n)), slo) for n in (2048, 512, 256)}
    found[0] = summary(simulate(trace, machine(), whole()), slo)
    gaps = [found[n]["tbt_s"]["max"] for n in (256, 512, 2048, 0)]
    assert gaps == sorted(gaps) and gaps[-1] > 5 * gaps[0]
    firsts = [found[n]["ttft_s"]["p90"] for n in (256, 512, 2048)]
    assert firsts == sorted(firsts, reverse=True), "the price: a prompt takes more steps"


def test_a_split_helps_where_the_gap_is_limited_and_not_where_it_is_not() -> None:
    """Four machines. Whole prompts first, or two that read and two that write (DistServe's comparison)."""
    trace, gpu = generate("conversation", 100, 60.0, 0), machine(state_bytes=131_072)
    kinds = {"together": whole(replicas=4), "apart": whole(prefill=2, decode=2)}
    runs = {name: simulate(trace, gpu, kind) for name, kind in kinds.items()}
    tight, loose = (
        {name: summary(run, slo)["attained"] for name, run in runs.items()}
        for slo in (Slo(ttft=2.0, tbt=0.05), Slo(ttft=0.12))
    )
    assert tight["apart"] > 0.7 and tight["together"] < 0.3
    assert loose["apart"] < loose["together"] - 0.2, loose


def test_sending_the_state_takes_its_bytes_over_the_bandwidth() -> None:
    trace = [Arrival(0.0, 1000, 3), Arrival(0.0, 1000, 3)]
    gpu = machine(state_bytes=100_000, link_byte_s=1e8)
    first, second = simulate(trace, gpu, whole(prefill=1, decode=1)).served
    write = 0.011 + 8e-8 * 1000 + 1e-9 * 1001
    assert first.gaps[0] == pytest.approx(1.0 + write)
    assert second.gaps[0] == pytest.approx(2.0 + write), "one link, one after the other"
    both = simulate(trace, gpu, whole(prefill=2, decode=1)).served
    assert both[1].gaps[0] == pytest.approx(1.0 + write, rel=1e-3), "two machines, two links"


def test_goodput_is_the_rate_at_which_the_limits_break() -> None:
    """One server, one at a time, arrivals in step: below 1 / service nobody waits, above it everybody later does."""
    trace = [Arrival(float(i), 1, 1) for i in range(200)]
    found = goodput(trace, machine(StepCost(overhead=0.1)), fleet(running=1), Slo(ttft=0.15))
    # The k-th waits k (0.1 - 1 / rate); nine in ten of 200 wait less than 0.05.
    assert found == pytest.approx(1 / (0.1 - 0.05 / 180), rel=0.02)
    half = at_rate(trace, found / 2)
    assert summary(simulate(half, machine(StepCost(overhead=0.1)), fleet(running=1)), Slo(ttft=0.15))["attained"] == 1.0


def test_goodput_of_limits_that_nothing_keeps_is_none() -> None:
    trace = [Arrival(float(i), 1000, 2) for i in range(20)]
    assert goodput(trace, machine(), fleet(), Slo(ttft=0.001)) == 0.0
    assert goodput(trace, machine(), fleet(), Slo(ttft=1e3)) == float("inf"), "even when all come at once"
    with pytest.raises(ValueError, match="goodput: no limit"):
        goodput(trace, machine(), fleet(), Slo())


def test_the_summary_is_made_of_the_times_of_tokens() -> None:
    trace = generate("code", 60, 4.0, 0)
    run = simulate(trace, machine(), fleet())
    found = summary(run, Slo(ttft=0.1, tpot=0.02))
    ttft = np.asarray([one.times[0] - one.arrival.at for one in run.served])
    tpot = [np.mean(np.diff(one.times)) if one.arrival.new > 1 else 0.0 for one in run.served]
    assert found["ttft_s"]["p99"] == pytest.approx(np.percentile(ttft, 99))
    assert found["tbt_s"]["mean"] == pytest.approx(np.concatenate([np.diff(one.times) for one in run.served]).mean())
    assert found["attained"] == np.mean((ttft <= 0.1) & (np.asarray(tpot) <= 0.02))
    assert found["throughput_tok_s"] * found["seconds"] == pytest.approx(sum(one.new for one in trace))


def test_a_sent_state_that_was_given_up_is_read_again() -> None:
    trace = generate("conversation", 20, 20.0, 3)
    room = max(one.prompt + one.new for one in trace) + 600
    back = simulate(trace, machine(capacity=room), whole(prefill=1, decode=1)).replicas[1]
    long = sum(one.new > 1 for one in trace)
    assert back.preempted > 0
    assert back.total.prefill - long >= back.preempted * min(one.prompt for one in trace) / 2
