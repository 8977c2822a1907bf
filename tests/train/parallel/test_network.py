"""Two machines, as two network namespaces with a cable between them: a slow one changes nothing, and one that is cut
stops both."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from assay.train.folder import METRICS
from assay.train.parallel.roll import CALL_S
from tests.train.parallel.test_torchrun import ROOT, same_as_alone
from tests.train.small import MODEL, RECIPE

pytestmark = pytest.mark.slow
SIDES = "ab"
PORT = "29511"
SLOW = ("tbf", "rate", "4mbit", "burst", "16kbit", "latency", "500ms")


def done(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


@dataclass
class Cable:
    """Machine a has the address ending in 1 and the first process, b the other one."""

    name: str
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def at(self, side: str, *words: str) -> str:
        """The output of a command on one machine."""
        return done("ip", "netns", "exec", f"{self.name}{side}", *words)

    def lay(self) -> None:
        ends = [f"{self.name}{side}" for side in SIDES]
        for place in ends:
            done("ip", "netns", "add", place)
        done("ip", "link", "add", ends[0], "netns", ends[0], "type", "veth", "peer", "name", ends[1], "netns", ends[1])
        for number, (side, end) in enumerate(zip(SIDES, ends, strict=True), 1):
            self.at(side, "ip", "address", "add", f"10.77.0.{number}/24", "dev", end)
            for device in (end, "lo"):
                self.at(side, "ip", "link", "set", device, "up")

    def train(self, folder: Path, *words: str) -> None:
        """The same command on both machines, as a scheduler gives it."""
        for name, tree in (("model.yaml", MODEL), ("recipe.yaml", RECIPE)):
            (folder / name).write_text(yaml.safe_dump(tree))
        told = ["train", str(folder / "model.yaml"), "--recipe", str(folder / "recipe.yaml"), "--device", "cpu"]
        for rank, side in enumerate(SIDES):
            env = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
            env |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": f"{self.name}{side}"}
            env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            command = ["ip", "netns", "exec", f"{self.name}{side}", sys.executable, "-m", "assay", *told]
            self.started.append(
                subprocess.Popen(
                    [*command, "--out", str(folder / "run"), *words], cwd=ROOT, env=os.environ | env, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )  # fmt: skip

    def ended(self, limit_s: float) -> list[str]:
        """What each process said on stderr, when both have ended."""
        end = time.monotonic() + limit_s
        return [process.communicate(timeout=max(0.1, end - time.monotonic()))[1] for process in self.started]

    def remove(self) -> None:
        for process in self.started:
            process.kill()
            process.communicate()
        for side in SIDES:
            subprocess.run(["ip", "netns", "delete", f"{self.name}{side}"], capture_output=True)


@pytest.fixture
def cable() -> Iterator[Cable]:
    if shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("ip and tc make the networks; Debian's package iproute2 has them")
    made = Cable(f"lab{os.getpid() % 100000}")
    try:
        try:
            made.lay()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield made
    finally:
        made.remove()


def test_a_slow_cable_changes_no_loss(cable: Cable, tmp_path: Path) -> None:
    for side in SIDES:
        cable.at(side, "tc", "qdisc", "add", "dev", f"{cable.name}{side}", "root", *SLOW)
    cable.train(tmp_path, "recipe.parallel.data=2")
    told = cable.ended(200.0)
    assert [p.returncode for p in cable.started] == [0, 0], told
    waited = cable.at("a", "tc", "-s", "qdisc", "show", "dev", f"{cable.name}a")
    assert "overlimits 0" not in waited, "nothing was held back"
    same_as_alone(tmp_path / "run")


def test_a_cut_cable_stops_both_and_each_names_the_other(cable: Cable, tmp_path: Path) -> None:
    wait_s, metrics = 5.0, tmp_path / "run" / METRICS
    cable.train(tmp_path, "recipe.parallel.data=2", f"recipe.parallel.timeout_s={wait_s}", "recipe.tokens=4194304")
    end = time.monotonic() + 150.0
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < end and all(p.poll() is None for p in cable.started)
        time.sleep(0.2)
    cable.at("b", "ip", "link", "set", f"{cable.name}b", "down")
    start = time.monotonic()
    first, second = cable.ended(120.0)
    took = time.monotonic() - start
    assert all(p.returncode not in (0, None) for p in cable.started)
    assert "error: process 1 of 0 to 1: killed, or no longer to be reached" in first, first
    assert "error: process 0, on whose machine" in second, second
    assert took < wait_s + 2 * CALL_S + 10.0, "and the time that two interpreters take to end"
