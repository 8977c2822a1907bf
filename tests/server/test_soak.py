"""The soak finds what is wrong, and only that."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import theilslopes

from assay.measure.load import Heard, Process, gauges, slope, summary
from tests.server.live import CONTEXT, NAME, Live

pytest.importorskip("openai", reason="openai is not installed: pip install openai")
ROOT = Path(__file__).resolve().parents[2]


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made  # the script imports its neighbour by this name
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def traffic() -> Iterator[Any]:
    yield module("traffic")
    del sys.modules["traffic"]


@pytest.fixture
def soak(traffic: Any, tmp_path: Path) -> Iterator[Any]:
    yield module("soak").Soak(tmp_path, 1, 1, 0)
    del sys.modules["soak"]


def visit(traffic: Any, server: Live, *kinds: str) -> list[str]:
    """What was wrong with one visit of each kind."""

    async def visits() -> list[str]:
        found = traffic.cases(server.model, server.tokenizer, 5, 0, 8)
        visitor, wrong = traffic.Traffic(server.url, NAME, found, random.Random(0)), []
        for kind in kinds or visitor.kinds:
            try:
                await visitor.once(kind)
            except traffic.Wrong as error:
                wrong.append(str(error).partition(":")[0])
        await visitor.close()
        assert not visitor.begun
        return wrong

    return asyncio.run(visits())


def test_a_server_that_is_right_passes(traffic: Any, live: Live) -> None:
    assert CONTEXT < 5000  # "refused" asks for that much
    assert visit(traffic, live) == []


def test_a_wrong_token_is_found(traffic: Any) -> None:
    kinds = ("greedy", "greedy stream", "slow reader", "several prompts", "schema")
    with Live() as server:
        server.force("x" * 70)
        assert visit(traffic, server, *kinds) == list(kinds)


def test_pages_that_are_lost_are_found(soak: Any) -> None:
    pages = {"assay_pages_used": 3.0, "assay_pages_free": 4.0, "assay_pages_cached": 5.0, "assay_pages_total": 12.0}
    soak.check_pages(pages)
    assert not soak.violations
    soak.check_pages({**pages, "assay_pages_free": 3.0})
    assert "3 free" in soak.violations[0]


@pytest.mark.parametrize("grown, found", [(0.9, 0), (1.1, 1)])
def test_memory_that_grows_is_found(soak: Any, grown: float, found: int) -> None:
    """From the first quarter on: what comes before is the process warming up."""
    limit = module("soak").GROWTH
    warming = [(float(t), 1e6 * t * t) for t in range(10)]
    soak.memory = [warming + [(float(t), 1e9 + grown * limit * (t - 10) / 29) for t in range(10, 40)]]
    (told,) = soak.growth()
    assert told["grown_bytes"] == pytest.approx(grown * limit, rel=1e-6) and len(soak.violations) == found


@pytest.mark.parametrize("seconds, grown, found", [(1200.0, 0.9, 0), (1200.0, 1.1, 1), (1100.0, 1.1, 0)])
def test_memory_that_does_not_settle_is_found(soak: Any, seconds: float, grown: float, found: int) -> None:
    """Within what a process may grow by, but still at the end of a long life."""
    at = [seconds * i / 40 for i in range(41)]
    soak.memory = [[(t, 1e9 + 2 * grown * module("soak").SETTLED * t / seconds) for t in at]]
    (told,) = soak.growth()
    assert told["settled_bytes"] == pytest.approx(grown * module("soak").SETTLED, rel=1e-6)
    assert len(soak.violations) == found


def test_what_the_log_tells_is_found(soak: Any) -> None:
    (soak.folder / "log").write_text('{"event": "request"}\n{"event": "engine", "error": "IndexError"}\nTraceback\n')
    soak.defects()
    assert ["IndexError" in soak.violations[0], "not JSON" in soak.violations[1]] == [True, True]


def test_a_slope_is_theil_and_sens() -> None:
    draw = random.Random(0)
    points = [(float(t), 3.0 * t + draw.gauss(0, 1) + 100 * (t % 7 == 0)) for t in range(30)]
    expected = theilslopes([y for _, y in points], [x for x, _ in points])
    assert slope(points) == pytest.approx(expected.slope)
    assert slope(points[:1]) == 0.0


def test_a_summary_by_hand() -> None:
    replies = [Heard(1.0, (1.5, 1.6, 1.8), 3), Heard(1.2, (2.2, 3.0), 2)]
    told = summary(replies)
    assert told["output_tok_s"] == pytest.approx(5 / 2.0)
    assert told["ttft_s_p50"] == pytest.approx(0.75) and told["itl_ms_p50"] == pytest.approx(200.0)
    with pytest.raises(ValueError, match="replies"):
        summary([Heard(0.0, (), 0)])
    assert gauges('# HELP a b\na{x="y z"} 2\nb 1e3\n') == {'a{x="y z"}': 2.0, "b": 1000.0}


def test_a_server_that_ends_early_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no model')"]
    said = pytest.raises(RuntimeError, match="status 1: no model")
    with Process(command, "http://127.0.0.1:9/health", tmp_path / "log") as process, said:
        process.wait(30)


@pytest.mark.slow
def test_a_short_soak_of_a_real_server(tmp_path: Path) -> None:
    """Half a minute with everything in it: all kinds of clients, a kill, a restart, a drain."""
    command = [sys.executable, ROOT / "benchmarks/soak.py", "--minutes", "0.6", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out").read_text())
    assert told == json.loads(done.stdout) and told["violations"] == [] and told["lives"] == 2
    assert len(told["visits"]) == 10 and min(told["visits"].values()) > 0 and told["status"] == 0
