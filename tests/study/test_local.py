"""The pool of processes and the folder: resuming, crashes, kills, timeouts, Ctrl-C, locks, full disks."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from assay.spec.result import Result, read_results, write_results
from assay.study.plan import Plan, Request, make_plan
from assay.study.runners.folder import Folder
from assay.study.runners.local import Failed, Pool, Silent, run_trials
from assay.study.trials import Trial, Use
from tests.study.test_plan import KV, POSITIONS, TOUR, _study, _tour
from tests.study.toy import MATERIALS
from tests.study.toy_trials import loss

TWO = Pool(2, "tests.study.toy_trials:run_trial")


def _plan(budget: str = "smoke") -> Plan:
    return make_plan(Request("s", _study(POSITIONS), budget), MATERIALS)


def _run(path: Path, plan: Plan, pool: Pool = TWO, watcher: Any = None) -> list[Failed]:
    with Folder(path) as folder:
        folder.bind(plan.digest, {"study": plan.name, "budget": plan.budget})
        return run_trials(plan.trials, folder, pool, watcher)


class Seen(Silent):
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.workers: dict[str, int] = {}

    def started(self, trial: Trial, worker: int) -> None:
        self.workers[trial.uses[0].arm] = worker

    def progressed(self, trial: Trial, event: dict[str, Any]) -> None:
        self.events.append((trial.name, f"{event['fraction']}"))

    def finished(self, trial: Trial, why: str | None) -> None:
        self.events.append((trial.name, why or "done"))


def _trials(path: Path) -> list[Result]:
    return [r for r in read_results(path / "results.jsonl") if r.kind == "trial"]


def test_every_trial_gives_its_lines_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    plan, seen = _plan(), Seen()
    assert _run(tmp_path, plan, replace(TWO, parts=("mine.py",)), seen) == []
    found = {(r.arm, r.seed): r for r in _trials(tmp_path)}
    for trial in plan.trials:
        result = found[trial.uses[0].arm, trial.seed]
        assert result.values["loss_nats"] == loss(trial.spec, trial.seed, trial.recipe)
        assert (result.spec_digest, result.recipe_digest) == trial.key[:2] and result.study == "s"
        assert result.values["threads"] == 1 and result.values["parts"] == ["mine.py"]
    pids = {r.values["pid"] for r in found.values()}
    assert 1 <= len(pids) <= 2 and os.getpid() not in pids
    assert ("s/none seed 0", "0.5") in seen.events and ("s/none seed 0", "done") in seen.events
    before = (tmp_path / "results.jsonl").read_bytes()
    assert _run(tmp_path, plan, replace(TWO, function="tests.study.toy_trials:crashing")) == []
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_crashes_and_exceptions_name_the_trial_and_the_rest_runs(tmp_path: Path) -> None:
    plan = _plan()
    failed = {
        f.trial.name: f.why for f in _run(tmp_path, plan, replace(TWO, function="tests.study.toy_trials:crashing"))
    }
    assert set(failed) == {"s/alibi seed 0", "s/rope seed 0", "s/rope seed 1"}
    assert "SIGKILL" in failed["s/alibi seed 0"] and "out of memory" in failed["s/alibi seed 0"]
    assert failed["s/rope seed 0"].startswith("ValueError: rope is broken")
    assert {(r.arm, r.seed) for r in _trials(tmp_path)} == {("none", 0), ("none", 1)}
    assert _run(tmp_path, plan) == [] and len(_trials(tmp_path)) == 5


def test_a_hanging_trial_is_stopped_at_the_limit(tmp_path: Path) -> None:
    pool = replace(TWO, function="tests.study.toy_trials:hanging", timeout_s=1.5)
    (failed,) = _run(tmp_path, _plan(), pool)
    assert failed.trial.name == "s/alibi seed 0" and "1.5 s" in failed.why and len(_trials(tmp_path)) == 4


def test_a_worker_killed_from_outside_is_reported(tmp_path: Path) -> None:
    class Killer(Seen):
        def started(self, trial: Trial, worker: int) -> None:
            if trial.uses[0].arm == "alibi":
                threading.Timer(0.5, os.kill, (worker, signal.SIGTERM)).start()

    (failed,) = _run(tmp_path, _plan(), replace(TWO, function="tests.study.toy_trials:hanging"), Killer())
    assert failed.trial.name == "s/alibi seed 0" and "SIGTERM" in failed.why


def test_what_is_no_result_is_a_failure(tmp_path: Path) -> None:
    failed = _run(tmp_path, _plan(), replace(TWO, function="tests.study.toy_trials:wordy"))
    assert len(failed) == 5 and "not Results" in failed[0].why


def test_an_unknown_function_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"accepted: package\.module:function"):
        _run(tmp_path, _plan(), replace(TWO, function="tests.study.toy_trials:absent"))


# Its imports stand under the guard: every worker imports its main module again.
SCRIPT = """
if __name__ == "__main__":
    import signal
    import sys
    from dataclasses import replace
    from pathlib import Path
    from tests.study.test_local import TWO, _plan, _run

    # A test run started in the background inherits an ignored SIGINT; a person's terminal does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _run(Path(sys.argv[1]), _plan("full"), replace(TWO, function="tests.study.toy_trials:hanging"))
"""


def _started(tmp_path: Path) -> tuple[subprocess.Popen[str], Path]:
    """A study in a process group of its own, once four runs are done and both workers hang in the fifth and sixth."""
    script, out = tmp_path / "go.py", tmp_path / "out"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, str(script), str(out)],
        env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not ((out / "results.jsonl").exists() and len(_trials(out)) == 4):
        time.sleep(0.05)
    return process, out


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("how", ["ctrl-c", "killed"])
def test_stopping_loses_nothing_and_leaves_no_process(tmp_path: Path, how: str) -> None:
    process, out = _started(tmp_path)
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    _, said = process.communicate(timeout=20)
    # The command's own traceback, and none from a worker.
    assert said.count("KeyboardInterrupt") == (how == "ctrl-c")
    deadline = time.monotonic() + 10
    while _alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(process.pid)
    before = {(r.arm, r.seed): r for r in _trials(out)}
    assert set(before) == {(arm, seed) for arm in ("none", "rope") for seed in (0, 1)}
    assert _run(out, _plan("full")) == []
    after = {(r.arm, r.seed): r for r in _trials(out)}
    assert len(after) == 9 and all(after[key] == value for key, value in before.items())


def test_one_user_at_a_time(tmp_path: Path) -> None:
    with Folder(tmp_path), pytest.raises(ValueError, match="in use by another run"), Folder(tmp_path):
        pass
    with Folder(tmp_path):
        pass


def test_another_plan_is_refused_with_both_digests(tmp_path: Path) -> None:
    first, other = _plan(), _plan("quick")
    with Folder(tmp_path) as folder:
        held = folder.bind(first.digest, {"study": "s", "budget": "smoke", "scale": 0.5})
        assert held["scale"] == 0.5
        assert folder.bind(first.digest, {"study": "s", "budget": "smoke", "scale": 0.7})["scale"] == 0.5
        with pytest.raises(ValueError, match=f"{first.digest}.*{other.digest}"):
            folder.bind(other.digest, {"study": "s", "budget": "quick"})
    (tmp_path / "plan.json").write_text("{")
    with Folder(tmp_path) as folder, pytest.raises(ValueError, match="not a plan"):
        folder.bind(first.digest, {})


def test_a_folder_that_is_none_or_holds_foreign_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"), Folder(tmp_path / "file"):
        pass
    write_results(tmp_path / "results.jsonl", [Result(kind="study", study="x", values={})])
    with Folder(tmp_path) as folder, pytest.raises(ValueError, match="no study this could resume"):
        folder.bind("0" * 16, {})


def test_a_full_disk_is_one_message_and_takes_back_the_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _plan()
    _run(tmp_path, plan)
    before = (tmp_path / "results.jsonl").read_bytes()

    def full(path: Path, results: Any) -> None:
        with open(path, "ab") as file:
            file.write(b'{"kind": "tri')
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("assay.study.runners.folder.write_results", full)
    with Folder(tmp_path) as folder, pytest.raises(OSError, match="make room and run the same command again"):
        folder.append([Result(kind="study", study="s", values={})])
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_a_real_full_disk(tmp_path: Path) -> None:
    """A file size limit is the nearest thing to a small disk that needs no rights: the write fails half way."""
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from assay.spec.result import Result; from assay.study.runners.folder import Folder\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "with Folder(sys.argv[1]) as folder:\n"
        "    folder.append([Result(kind='study', study='a', values={})])\n"
        "    size = folder.results.stat().st_size\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))\n"
        "    try: folder.append([Result(kind='study', study='b' * 999, values={})])\n"
        "    except OSError: print(folder.results.stat().st_size - size, len(folder.read()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]


def test_a_run_that_was_cut_off_is_repeated_without_its_old_lines(tmp_path: Path) -> None:
    plan = _plan("full")
    _run(tmp_path, plan)
    whole = sorted(map(repr, read_results(tmp_path / "results.jsonl")))
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    gone = next(i for i, line in enumerate(lines) if '"trial"' in line and '"rope"' in line)
    (tmp_path / "results.jsonl").write_text("".join(lines[:gone] + lines[gone + 1 :]))
    assert _run(tmp_path, plan) == []
    again = read_results(tmp_path / "results.jsonl")
    pids = {r.values.pop("pid", None) for r in again}
    assert pids and len(again) == len(whole)


def test_shared_runs_appear_under_both_stages_and_run_once(tmp_path: Path) -> None:
    plan = make_plan(Request("tour", _study(TOUR), "full"), MATERIALS, find=_tour)
    assert _run(tmp_path, plan) == []
    results = read_results(tmp_path / "results.jsonl")
    lines = {(r.study, r.arm, r.seed): r for r in results if r.kind == "trial"}
    assert len(lines) == 13 and len({(r.spec_digest, r.recipe_digest, r.seed) for r in lines.values()}) == 11
    first, other = (dict(lines[at].values) for at in (("positions", "none", 0), ("kv", "base", 0)))
    assert first.pop("measured") == ["latency", "extrapolation"] and other.pop("measured") == ["extrapolation"]
    assert first == other
    measured = {(r.study, r.values["what"]) for r in results if r.kind == "measure"}
    assert measured == {("positions", "latency"), ("positions", "extrapolation"), ("kv", "extrapolation")}


def test_a_run_known_under_other_names_is_copied(tmp_path: Path) -> None:
    plan = make_plan(Request("kv", _study(KV), "full"), MATERIALS)
    _run(tmp_path, plan)
    trials = [replace(t, uses=(Use("later", "chosen", t.uses[0].measurements),)) for t in plan.trials[:1]]
    with Folder(tmp_path) as folder:
        assert run_trials(trials, folder, replace(TWO, function="tests.study.toy_trials:crashing")) == []
        (copied,) = [r for r in folder.read() if r.kind == "trial" and r.study == "later"]
        first = trials[0]
        assert copied.arm == "chosen" and copied.values["loss_nats"] == loss(first.spec, first.seed, first.recipe)
        more = [replace(t, uses=(Use("more", "chosen", ("passkey",)),)) for t in trials]
        assert folder.adopt(more) == more


def test_conclusions_are_put_afresh(tmp_path: Path) -> None:
    plan = _plan()
    _run(tmp_path, plan)
    with Folder(tmp_path) as folder:
        for title in ("first", "second"):
            folder.rewrite([Result(kind="study", study="s", values={"title": title})])
        kinds = [r.kind for r in folder.read()]
        assert kinds.count("study") == 1 and kinds.count("trial") == 5
        assert folder.read()[0].values["title"] == "second"
