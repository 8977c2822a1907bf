"""Trials as jobs of Slurm, through submitit; or of submitit's own processes, where there is no Slurm."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assay.study.runners.folder import Folder
from assay.study.runners.local import Failed, Pool, Watcher
from assay.study.runners.remote import RETRIES, Lost, run_on, work
from assay.study.trials import Trial

POLL_S = 1.0
JOBS = ".slurm"
PROCESSES = "local"
MINUTES = 240
QUEUED = 500
"""Jobs in the queue at once: more are refused by many clusters."""


@dataclass(frozen=True)
class OnSlurm:
    """partition: of Slurm; `local` for processes of this machine, as many as the pool has workers. minutes: the time
    limit of one trial. The study's folder must be on a disk that all nodes see: jobs leave their results there."""

    partition: str | None = None
    gpus: int = 0
    minutes: int = MINUTES

    def __call__(
        self, trials: Sequence[Trial], folder: Folder, pool: Pool | None = None, watcher: Watcher | None = None
    ) -> list[Failed]:
        """As `local.run_trials`. ValueError where Slurm is not there."""
        pool = pool or Pool()
        return run_on(_Queue(self, folder.path / JOBS, pool), trials, folder, pool, watcher)


@dataclass
class _Queue:
    settings: OnSlurm
    folder: Path
    pool: Pool
    executor: Any = field(init=False)
    jobs: dict[str, tuple[Any, dict[str, Any], str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import submitit

        kind = PROCESSES if self.settings.partition == PROCESSES else "slurm"
        try:
            self.executor = submitit.AutoExecutor(folder=self.folder.resolve(), cluster=kind)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"--engine slurm: {str(error) or 'sbatch is not here'}; accepted without Slurm: --address local"
            ) from None
        asked: dict[str, Any] = {"timeout_min": self.settings.minutes, "cpus_per_task": self.pool.threads}
        if self.settings.gpus:
            asked["gpus_per_node"] = self.settings.gpus
        if kind == "slurm" and self.settings.partition is not None:
            asked["slurm_partition"] = self.settings.partition
        self.executor.update_parameters(name="assay", **asked)

    def submit(self, job: dict[str, Any], function: str, tries: int = 0, key: str = "") -> str:
        made = self.executor.submit(work, job, function)
        key = key or str(made.job_id)
        self.jobs[key] = (made, job, function, tries)
        return key

    def wait(self, running: Sequence[str]) -> list[tuple[str, Callable[[], Any]]]:
        """Those that ended; a job that ended without a result and without an error of its own is submitted again."""
        import submitit

        ended = []
        for key in running:
            made, job, function, tries = self.jobs[key]
            if not made.done():
                continue
            try:
                found = made.result()
            except submitit.core.utils.FailedJobError as error:
                own = _raised(str(error))
                ended.append((key, lambda why=own: _lose(why)))
            except submitit.core.utils.UncompletedJobError:
                if tries < RETRIES:
                    self.submit(job, function, tries + 1, key)
                else:
                    why = f"was lost {tries + 1} times: its process ended without a result ({made.state})"
                    ended.append((key, lambda why=why: _lose(why)))
            else:
                ended.append((key, lambda found=found: found))
        if not ended:
            time.sleep(POLL_S)
        return ended  # type: ignore[return-value]

    def free(self, running: int) -> int:
        return (self.pool.size if self.settings.partition == PROCESSES else QUEUED) - running

    def cancel(self, running: Sequence[str]) -> None:
        for key in running:
            self.jobs[key][0].cancel(check=False)


def _raised(said: str) -> str:
    """The error of the trial itself: the last line of the traceback that submitit tells."""
    plain = [line for line in said.splitlines() if line and not line.startswith((" ", "-", "You can"))]
    return plain[-1] if plain else "failed without a reason"


def _lose(why: str) -> Any:
    raise Lost(why)
