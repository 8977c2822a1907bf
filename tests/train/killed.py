"""Run as a program: trains in a child process, kills it again and again, and goes on until a child finishes.

usage: killed.py FOLDER SEED TIMES. Prints how many children were killed, and after how many steps each was saved.
Children are forked from a process that has imported everything, so that a kill lands in training and not in imports.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from assay.model.lm import build
from assay.train.checkpoint import read_run
from assay.train.loop import Options, train
from tests.train.small import data, model, recipe


def child(folder: Path) -> None:
    try:
        train(model(), recipe(tokens=1280), folder, resume=True, options=Options(save_s=0.0))
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def main(folder: Path, seed: int, times: int) -> int:
    torch.set_num_threads(1)
    data()
    build(model())
    torch.optim.AdamW([torch.zeros(1)])  # imports what takes a second, so that no child has to
    draws, saved = random.Random(seed), []
    for _ in range(times):
        pid = os.fork()
        if pid == 0:
            child(folder)
        time.sleep(draws.uniform(0.02, 0.3))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            break
        run = read_run(folder)
        saved.append(run.step if run else 0)
    pid = os.fork()
    if pid == 0:
        child(folder)
    print(len(saved), *saved)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
