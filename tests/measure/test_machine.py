"""Speed, memory and kernels: bytes exactly, times by their order and their bounds."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

from assay.measure import kernels, latency, machine, memory, serving
from assay.measure.training import bench_recipe, utilisation
from assay.model.lm import weight_table
from assay.ops.attend import oracle
from tests.measure.subjects import spec, subject


@pytest.mark.parametrize("mixer", [{}, {"kv_heads": 1}, {"sees": {"window": 5}}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_predicted_measured_and_by_hand(mixer: dict[str, Any], dtype: torch.dtype) -> None:
    made = subject(spec(**mixer), dtype=dtype)
    for row in memory.measure(made, batches=(1, 3), contexts=(7, 12)):
        kept = min(row["context"], mixer.get("sees", {}).get("window", 99))
        by_hand = row["batch"] * kept * 2 * 2 * mixer.get("kv_heads", 2) * 8 * dtype.itemsize
        assert row["state_bytes_predicted"] == row["state_bytes_measured"] == by_hand
        assert row["peak_memory_bytes"] > 30 << 20 and row["peak_of"] in ("row", "process")


def test_a_length_out_of_reach_is_a_row_with_a_reason() -> None:
    made = subject(spec({"kind": "learned"}))
    made.model.float()
    for topic in (memory, latency):
        (row,) = topic.measure(made, batches=(1,), contexts=(17,), **({"cache": ["rows"]} if topic is latency else {}))
        assert "end at 16" in row["reason"]


def test_the_peak_sees_what_was_held() -> None:
    if not machine.CPUINFO.is_file() or not memory.start_peak():
        pytest.skip("this system does not let a process start its peak afresh")
    before = memory.peak_bytes()
    block = torch.ones(256 << 18)  # more than what other tests left may be given back meanwhile
    del block
    assert memory.peak_bytes() - before > 96 << 20


def test_latency_rows() -> None:
    made = subject(dtype=torch.float32)
    rows = latency.measure(made, batches=(1, 4), contexts=(12,), seconds=0.2)
    assert [(r["batch"], r["cache"]) for r in rows] == [(1, "rows"), (1, "none"), (4, "rows"), (4, "none")]
    for row in rows:
        assert 0 < row["prefill_s"] <= row["ttft_s"]
        assert 0 < row["itl_ms_p50"] <= row["itl_ms_p99"]
        assert row["decode_tok_s"] == pytest.approx(1e3 * row["batch"] / row["itl_ms_p50"])
        assert 0 < row["decode_tok_s"] < row["roofline_tok_s"]
    with pytest.raises(ValueError, match="accepted: rows, none"):
        latency.measure(made, cache=["paged"])


def test_each_row_has_its_own_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(runs: list[serving.Serving], budget_s: float) -> list[serving.Times]:
        gaps = [(run.load.batch + run.load.context / 100 + 10 * run.load.cache,) for run in runs]
        return [serving.Times(1.0, 2.0, gap) for gap in gaps]

    monkeypatch.setattr(latency, "timed", timed)
    for row in latency.measure(subject(dtype=torch.float32), batches=(1, 4), contexts=(6, 12)):
        expected = row["batch"] + row["context"] / 100 + 10 * (row["cache"] == "rows")
        assert row["itl_ms_p50"] == pytest.approx(1e3 * expected)


def test_decoding_with_the_cache_and_without_it_says_the_same() -> None:
    """Both ways of the benchmark compute the same logits, so that it times the same work."""
    made, found = subject(), {}
    for cache in (True, False):
        run = serving.Serving(made.model, serving.Load(2, 12, 4, cache))
        run.ids[:, 8:] = 7
        seen = found.setdefault(cache, [])
        run.choose = lambda logits, seen=seen: seen.append(logits.clone()) or [[7], [7]]  # type: ignore[method-assign, misc]
        for step in run._steps():
            step()
    assert len(found[True]) == len(found[False]) == 4
    assert torch.allclose(torch.stack(found[True]), torch.stack(found[False]), atol=1e-10)


def test_the_roofline_reads_weights_once_and_the_state_of_all() -> None:
    made = subject(spec({"kind": "learned"}), dtype=torch.float32)
    roof = serving.roofline(made.model, serving.Load(3, 10, 2))
    layer = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16
    assert roof.weight_bytes_read == 4 * (256 * 16 + 2 * layer + 16)  # the tied table, but not that of positions
    assert roof.state_bytes_read == 3 * 10 * 2 * 2 * 2 * 8 * 4
    moved = (roof.weight_bytes_read + roof.state_bytes_read) / roof.memory_byte_s
    assert roof.decode_s >= moved and roof.prefill_s > 0
    untied = spec().model_copy(update={"head": type(spec().head)(tie=False)})
    assert serving.weights_read(untied, 1) == sum(w.numel for w in weight_table(untied).values()) - 256 * 16


def test_a_load_that_cannot_be_is_refused() -> None:
    for load in ((0, 4, 1), (1, 4, 4), (1, 1, 1), (1, 4, 0)):
        with pytest.raises(ValueError, match="accepted"):
            serving.Load(*load)


def test_kernels_count_bytes() -> None:
    found = kernels.measure(subject(), lengths=(128, 256), seconds=0.05)
    rows = {(r["backend"], r["length"]): r for r in found}
    naive, tiled = ([rows[name, n] for n in (128, 256)] for name in ("naive", "tiled"))
    # The masked scores, the probabilities and the output.
    for row, n in zip(naive, (128, 256), strict=True):
        assert row["peak_bytes"] == 2 * 4 * n * n + 4 * n * 64
        assert row["traffic_bytes"] == 4 * (4 * n * n + 4 * n * 64)
    assert tiled[1]["peak_bytes"] / tiled[0]["peak_bytes"] < 2.2
    assert tiled[1]["traffic_bytes"] < naive[1]["traffic_bytes"]
    assert rows["sdpa", 256]["traffic_bytes"] is None
    assert len(found) == 8 and "train_seconds" not in found[0]  # too short for slopes
    with pytest.raises(ValueError, match="accepted: naive, oracle"):
        kernels.measure(subject(), backends=["flash"])


def test_kernels_of_training_by_closed_forms() -> None:
    sizes = (256, 512, 1024)
    found = kernels.measure(subject(), lengths=sizes, backends=("naive", "tiled"), backward=True, seconds=0.05)
    rows = {(r["backend"], r["length"]): r for r in found}
    for n in sizes:
        naive, tiled = rows["naive", n], rows["tiled", n]
        # Probabilities, their gradient and that of the scores, beside the output and the gradient of the values.
        assert naive["train_peak_bytes"] == 3 * 4 * n * n + 2 * 4 * n * 64
        assert naive["train_traffic_bytes"] == 4 * (11 * n * n + 12 * n * 64)
        pairs, tile = (n // 64) * (n // 64 + 1) // 2, 64 * 64
        forward = 2 * n * 64 + n + pairs * 2 * tile
        backward = 4 * n * 64 + 2 * n + pairs * 6 * tile  # k, v and their gradients in, the gradients out
        assert tiled["train_traffic_bytes"] == 4 * (forward + backward)
        assert 0 < tiled["seconds"] < tiled["train_seconds"]
    naive, tiled = kernels.slopes(found, least=256)
    assert naive["from_length"] == 256 and naive["length"] is naive["seconds"] is None
    for column in ("peak_bytes_slope", "train_peak_bytes_slope"):
        assert 1.9 < naive[column] < 2 and 0.4 < tiled[column] < 1


def test_slopes_are_planted_powers() -> None:
    rows = [
        {"backend": b, "length": n, "seconds": 3e-9 * n**p, "traffic_bytes": None}
        for b, p in (("a", 2.0), ("b", 1.0))
        for n in (64, 1024, 2048, 4096)
    ]
    rows[0]["seconds"] = 1.0  # shorter than where the fit begins
    first, second = kernels.slopes([*rows, {"backend": "c", "length": 4096, "seconds": 1.0}])
    assert first["seconds_slope"] == pytest.approx(2) and second["seconds_slope"] == pytest.approx(1)
    assert first["backend"] == "a" and "traffic_bytes_slope" not in first


def test_what_is_slow_runs_once() -> None:
    calls: list[float] = []
    sleep = lambda: calls.append(time.sleep(0.01) or 0.0)  # type: ignore[func-returns-value]  # noqa: E731
    assert kernels.timed(sleep, torch.device("cpu"), 0.005) >= 0.01 and len(calls) == 1
    assert kernels.timed(sleep, torch.device("cpu"), 0.1) >= 0.01 and len(calls) > 3


def test_every_kernel_computes_the_same() -> None:
    work = kernels.Work.of(20, 2, 8, torch.device("cpu"))
    expected = oracle.run(work.call())[0][0]
    gradients = torch.autograd.grad(expected, work.given, work.upstream)
    for backend in kernels.DEFAULT:
        out = work.runner(backend)()
        assert torch.allclose(out, expected, atol=1e-5)
        for got, want in zip(torch.autograd.grad(out, work.given, work.upstream), gradients, strict=True):
            assert torch.allclose(got, want, atol=1e-5)


def test_held_bytes_are_those_alive_at_once() -> None:
    with kernels.Held() as held:
        a = torch.ones(1000)
        b = a + 1
        view = b.view(10, 100)
        del b
        del a
        view.add_(1)
        c = view + 1
    assert held.peak == 8000 and c.numel() == 1000
    before = torch.ones(1000)
    with kernels.Held() as held:
        before.view(10, 100).add_(1)
        for _ in range(50):
            before + 1
    assert held.peak == 4000


def test_rates_against_a_stopwatch() -> None:
    """The rate says how long the product takes, within what a busy machine allows."""
    a = torch.randn(machine.SIZE, machine.SIZE)
    start = time.perf_counter()
    a @ a
    took = time.perf_counter() - start
    rate = machine.matmul_flop_s(torch.float32)
    assert 0.1 < took * rate / (2 * machine.SIZE**3) < 20
    assert machine.memory_byte_s(1 << 20) > 0.5 * machine.memory_byte_s(1 << 25)


def test_the_environment_is_what_a_result_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "matmul_flop_s", lambda dtype, device: 1e9)
    monkeypatch.setattr(machine, "memory_byte_s", lambda count, device: 2e9)
    found = machine.environment()
    assert found["bf16_matmul_gflop_s"] == 1.0 and found["memory_gb_s"] == 2.0
    assert found["cpu"] and found["cores"] >= 1 and found["memory_bytes"] > 1 << 28
    assert found["precision"] in ("float32", "bfloat16")
    json.dumps(found, allow_nan=False)


def test_utilisation_is_flops_over_the_measured_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay.measure.training.matmul_seconds", lambda *given: 2 * 2048**3 / 1e9)
    made = spec(layers=1)
    found = utilisation(made, bench_recipe(2, 8, "float32"), torch.device("cpu"), 3)
    params = sum(w.numel for w in weight_table(made).values())
    flops = 6 * params + 12 * 1 * 16 * 8
    assert found.mfu == pytest.approx(flops * found.train_tok_s / 1e9)
    pairs = 8 * 9 // 2
    layer = 2 * (4 * 16 * 16 + 3 * 16 * 24)
    exact = 3 * (8 * (layer + 2 * 256 * 16) + 4 * 16 * pairs) // 8
    assert found.exact_utilisation == pytest.approx(exact * found.train_tok_s / 1e9, rel=1e-3)
    assert found.of == "the f32 matmul rate" and found.matmul_gflop_s == {"f32": 1.0, "bf16": 1.0}
    assert len(found.step_s) == 3
    assert found.as_json()["mfu_best_step"] == pytest.approx(flops * 16 / min(found.step_s) / 1e9)
    with pytest.raises(ValueError, match="steps: 0"):
        utilisation(made, bench_recipe(2, 8, "float32"), torch.device("cpu"), 0)
