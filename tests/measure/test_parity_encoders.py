"""`assay parity` with a reference file of an encoder, a classifier and an encoder-decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from assay.cli.main import main
from tests.hub import encoders
from tests.hub.test_encoders import IDS, PREFIX


@torch.no_grad()
def reference(model: Any, two: bool) -> dict[str, Tensor]:
    """Hidden states, a right-padded batch and, of an encoder-decoder, a greedy reply, each from the whole text."""
    more = {"decoder_input_ids": PREFIX} if two else {}
    out = model(input_ids=IDS, output_hidden_states=True, **more)
    found = {"input_ids": IDS, "logits": out.logits, **more}
    sides = {"enc.": out.encoder_hidden_states, "": out.decoder_hidden_states} if two else {"": out.hidden_states}
    for name, hidden in sides.items():
        found |= {f"{name}hidden.{i}": h for i, h in enumerate(hidden[:-1])} | {f"{name}final": hidden[-1]}
    keep = torch.ones_like(IDS)
    keep[0, 5:] = 0
    padded = model(input_ids=IDS, attention_mask=keep, **more).logits
    found |= {
        f"rightpad.{k}": v for k, v in {"input_ids": IDS, "attention_mask": keep, "logits": padded, **more}.items()
    }
    if two:
        said = PREFIX[:, :1]
        for _ in range(4):
            logits = model(input_ids=IDS, decoder_input_ids=said).logits
            said = torch.cat([said, logits[:, -1:].argmax(-1)], 1)
        found |= {"greedy_ids": said[:, 1:], "greedy_logits": logits}
    return {k: v.clone().contiguous() for k, v in found.items()}


def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    status = main(["parity", str(folder), "--reference", str(folder / "reference.safetensors"), "--json"])
    told = capsys.readouterr()
    assert status < 2, told.err
    return status, json.loads(told.out.splitlines()[-1])


@pytest.mark.parametrize("name", ["roberta", "bert-classifier", "t5-v1.1"])
def test_match_and_first_difference(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = name in encoders.TWO_SIDED
    made = encoders.save(name, tmp_path)
    save_file(reference(made, two), tmp_path / "reference.safetensors")
    status, told = run(tmp_path, capsys)
    assert status == 0 and told["match"]
    compared = {row["quantity"] for row in told["rows"]}
    assert {"hidden.0", "hidden.1", "logits", "rightpad.logits"} <= compared
    assert ({"enc.hidden.0", "enc.hidden.2", "enc.final", "greedy_ids", "greedy_logits"} <= compared) == two
    last = ["enc.hidden.3", "hidden.2"] if two else ["hidden.2"]  # transformers tells what the final norm made of it
    assert told["absent"] == [f"{quantity}: not in the reference" for quantity in last]

    config = json.loads((tmp_path / "config.json").read_text())
    config["layer_norm_epsilon" if two else "hidden_act"] = 0.3 if two else "relu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, told = run(tmp_path, capsys)
    first = told["first_divergence"]
    assert status == 1 and not told["match"]
    if two:
        assert (first["layer"], first["step"], first["cause"]) == (None, "enc.hidden.1", None)
    else:
        assert first["layer"] == 0 and first["step"] == "ffn" and "act" in first["cause"]


def test_a_reference_without_the_decoders_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = encoders.save("bart", tmp_path)
    found = reference(made, True)
    del found["decoder_input_ids"]
    save_file(found, tmp_path / "reference.safetensors")
    assert main(["parity", str(tmp_path), "--reference", str(tmp_path / "reference.safetensors")]) == 2
    assert "decoder_input_ids: missing; a reference has input_ids, decoder_input_ids" in capsys.readouterr().err
