"""Trials on a Ray cluster: the same Results as here, two nodes, a node that is lost, errors that are named."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from assay.spec.result import read_results
from assay.study.plan import Plan, Request, make_plan
from assay.study.runners.local import run_trials
from assay.study.runners.ray import OnRay
from tests.study.remote import lines, ran
from tests.study.test_plan import POSITIONS, _study
from tests.study.toy import MATERIALS

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray", reason="needs the extra `cluster`")


def _plan() -> Plan:
    return make_plan(Request("s", _study(POSITIONS), "smoke"), MATERIALS)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    ray.shutdown()
    made.shutdown()


def test_two_nodes_give_the_results_of_one_machine(cluster: Any, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    plan = _plan()
    assert ran(tmp_path / "local", plan, run_trials) == []
    assert ran(tmp_path / "ray", plan, OnRay(cluster.address), "slow") == []
    assert lines(tmp_path / "ray") == lines(tmp_path / "local")
    trials = [r for r in read_results(tmp_path / "ray" / "results.jsonl") if r.kind == "trial"]
    assert len({r.values["pid"] for r in trials}) >= 2
    assert {r.values["threads"] for r in trials} == {1}
    before = (tmp_path / "ray" / "results.jsonl").read_bytes()
    assert ran(tmp_path / "ray", plan, OnRay(cluster.address), "crashing") == []
    assert (tmp_path / "ray" / "results.jsonl").read_bytes() == before


def test_a_lost_node_costs_no_trial_and_an_error_costs_one(cluster: Any, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    plan = _plan()
    killer = threading.Thread(target=lambda: (time.sleep(4.0), cluster.remove_node(node, allow_graceful=False)))
    killer.start()
    assert ran(tmp_path / "lost", plan, OnRay(cluster.address), "slow") == []
    killer.join()
    assert ran(tmp_path / "local", plan, run_trials) == []
    assert lines(tmp_path / "lost") == lines(tmp_path / "local")
    failed = {f.trial.name: f.why for f in ran(tmp_path / "bad", plan, OnRay(cluster.address), "crashing")}
    assert set(failed) == {"s/alibi seed 0", "s/rope seed 0", "s/rope seed 1"}
    assert failed["s/rope seed 0"] == "ValueError: rope is broken"
    assert "lost 4 times" in failed["s/alibi seed 0"]


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--address 127.0.0.1:1: no Ray cluster answers there"):
        ran(tmp_path, _plan(), OnRay("127.0.0.1:1"))
