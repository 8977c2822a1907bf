"""The whole model through a compiler: one graph for a training step, in both precisions."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# In a process without the shape checks of the test run, which tracing cannot see through.
TRACE = """
import sys
import torch
from assay.train.evaluate import step_of
from assay.train.precision import Runner
from tests.train.small import learner, recipe

made = learner(how=recipe(precision=sys.argv[1]))
batch, graphs = next(made.loader), []

def count(graph, inputs):
    graphs.append(graph)
    return graph.forward

runner = Runner(made.model, sys.argv[1])
call = torch.compile(runner._call, backend=count, fullgraph=True)
given = {"targets": batch.targets, "options": made.options}
torch.testing.assert_close(call(step_of(batch), **given).loss["nll"], runner._call(step_of(batch), **given).loss["nll"])
assert len(graphs) == 1, len(graphs)
"""


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_step_is_one_graph(precision: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", TRACE, precision],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
