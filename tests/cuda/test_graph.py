"""Decoded tokens from CUDA graphs against the same steps in Python."""

from __future__ import annotations

import pytest
import torch

from assay.engine.runner import Runner
from assay.engine.tapes import Recorded
from assay.model.lm import build
from assay.ops.graph import Graph
from assay.spec.load import load_model
from tests.engine.test_tapes import MIXERS, PAGES, ROWS, SMALL, decoded, in_python, texts


@pytest.mark.parametrize("name", MIXERS)
def test_a_graph_has_the_logits_of_the_step_in_python(name: str) -> None:
    """Over views that grow, sequences that leave, and pages that are no run."""
    model = build(load_model("llama-11m", SMALL | MIXERS[name])).cuda()
    size = ROWS if name in ("mamba2", "moe") else PAGES
    prompts, tokens = [row[: 9 + 3 * i] for i, row in enumerate(texts(3, 40))], texts(72, 3, 1)
    runner = Runner(model, size)
    found = decoded(runner, prompts, tokens, 1)
    torch.testing.assert_close(found, decoded(in_python(model, size), prompts, tokens, 1))
    graphs = [one for one in runner.tapes.made.values() if isinstance(one, Recorded) and isinstance(one.tape, Graph)]
    assert len(graphs) >= 2, runner.tapes.refused
