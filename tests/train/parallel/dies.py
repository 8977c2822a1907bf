"""Run by torchrun: `assay` with a process that dies, or falls asleep, before its fourth step.

usage: dies.py RANK HOW WORD...; HOW is kill, sleep or never. Only before the first restart.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from assay.cli.main import main
from assay.train.learner import Learner, Taken

STEP = 3


def falling(rank: str, how: str) -> None:
    real = Learner.step

    def step(self: Learner, number: int, steps: int) -> Taken:
        if number == STEP and os.environ["RANK"] == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "sleep":
                time.sleep(20.0)
        return real(self, number, steps)

    Learner.step = step  # type: ignore[method-assign]


if __name__ == "__main__":
    falling(*sys.argv[1:3])
    sys.exit(main(sys.argv[3:]))
