"""`assay parity` beside transformers as it runs, on models that it takes care to compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from assay.cli.main import main
from tests.hub import test_recurrent_elementwise as elementwise
from tests.hub.test_mixtures import gemma4, llama4
from tests.model.hf import randomised

PADDED = "leftpad.logits: transformers itself computes another thing for a padded row than for the row alone"


def griffin() -> Any:
    return hf.RecurrentGemmaForCausalLM(hf.RecurrentGemmaConfig(**elementwise.GRIFFIN))


def rwkv() -> Any:
    return hf.RwkvForCausalLM(hf.RwkvConfig(**elementwise.TIME))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: gemma4()[0], []),  # whose first layer has tensors that stand outside of it
        (lambda: llama4()[0], [PADDED]),  # whose chunks are cut by columns
        (griffin, [PADDED]),  # whose recurrences take padding for tokens, as rwkv's
        (rwkv, [PADDED]),
    ],
)
def test_it_agrees(
    make: Callable[[], Any], told: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = randomised(make(), 3)
    model.save_pretrained(tmp_path)
    assert main(["parity", str(tmp_path), "--tokens", "14", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["absent"] == told
    layers = {f"hidden.{i}" for i in range(model.config.num_hidden_layers + 1)}
    assert layers | {"rightpad.logits", "greedy_logits"} <= {row["quantity"] for row in found["rows"]}
