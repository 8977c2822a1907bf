"""Run as a program: trains in a child process, kills it again and again, and goes on until a child finishes.

usage: killed.py FOLDER SEED TIMES. Prints how many children were killed, and after how many steps each was saved.
Children are forked from a process that has imported everything, so that a kill lands in training and not in imports.
A child tells each of its steps through a pipe, and is killed some milliseconds after it told its first, second or
third: within a step or a save, however fast the machine is.
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
from assay.train.outcome import Status
from tests.train.small import data, model, recipe


def child(folder: Path, told: int) -> None:
    def tell(_: Status) -> None:
        os.write(told, b".")

    try:
        options = Options(save_s=0.0, report_s=0.0)
        train(model(), recipe(tokens=1280), folder, resume=True, on_progress=tell, options=options)
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
        hears, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(folder, told)
        os.close(told)
        for _ in range(draws.randint(1, 3)):
            os.read(hears, 1)  # of a child that has ended: nothing, at once
        os.close(hears)
        time.sleep(draws.uniform(0.0, 0.02))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            break
        run = read_run(folder)
        saved.append(run.step if run else 0)
    pid = os.fork()
    if pid == 0:
        child(folder, os.open(os.devnull, os.O_WRONLY))
    print(len(saved), *saved)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
