"""Weights & Biases, online or, with WANDB_MODE=offline, into the run's folder for `wandb sync`.

The key is wandb's own affair (WANDB_API_KEY, ~/.netrc): it is never read here. What wandb would collect by itself is
switched off: the command line, the environment, code, git, the machine's use, and what is printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from assay.train.tracking.base import About, told

PROJECT = "assay"


class Wandb:
    def __init__(self, about: About) -> None:
        import wandb

        settings = wandb.Settings(
            console="off", disable_code=True, disable_git=True, x_disable_meta=True, x_disable_stats=True, silent=True
        )
        self._run = wandb.init(
            project=PROJECT,
            id=about.name,
            name=about.folder.name,
            resume="allow",
            dir=str(about.folder),
            config=dict(about.fields),
            settings=settings,
        )
        # An axis of our own: wandb's may only grow, and a run that was killed takes some steps again.
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log({"step": row["step"], **told(row)})

    def close(self) -> None:
        self._run.finish()


def opened(about: About) -> Wandb:
    return Wandb(about)
