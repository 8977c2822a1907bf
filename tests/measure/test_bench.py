"""`assay bench`: the keys that scripts rely on, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from assay.cli.main import main
from assay.spec.load import dump, to_yaml
from assay.train.checkpoint import save_checkpoint
from tests.measure.subjects import spec, subject

SERVING = {
    "prefill_tok_s", "decode_tok_s", "ttft_s", "itl_ms_p50", "itl_ms_p99", "weight_bytes", "state_bytes_predicted",
    "state_bytes_measured", "roofline",
}  # fmt: skip


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_serving_a_checkpoint_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = subject()
    save_checkpoint(tmp_path / "ckpt", made.model.float(), made.tokenizer)
    (tmp_path / "m.yaml").write_text(to_yaml(dump(made.spec)))
    for source in ("ckpt", "m.yaml"):
        how = ["--prompt-len", "8", "--new-tokens", "4", "--batch", "2", "--seconds", "0.1", "--dtype", "f32", "--json"]
        assert main(["bench", str(tmp_path / source), *how]) == 0
        values = last_line(capsys)
        assert values.keys() >= SERVING
        assert values["state_bytes_predicted"] == values["state_bytes_measured"] == 2 * 12 * 2 * 2 * 2 * 8 * 4
        assert values["weight_bytes"] == 4 * sum(p.numel() for p in made.model.parameters())
    assert main(["bench", str(tmp_path / "ckpt"), "model.layers=1"]) == 2


def test_training(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay.measure.training.matmul_seconds", lambda *given: 0.1)
    (tmp_path / "m.yaml").write_text(to_yaml(dump(spec())))
    how = ["--train", "--batch", "2", "--seq", "8", "--steps", "2", "--dtype", "f32", "--json"]
    assert main(["bench", str(tmp_path / "m.yaml"), "model.layers=1", *how]) == 0
    values = last_line(capsys)
    assert values["train_tok_s"] > 0 and 0 < values["mfu"] < 1  # type: ignore[operator]
    assert values["mfu_of"] == "the f32 matmul rate" and set(values["matmul_gflop_s"]) == {"f32", "bf16"}  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dtype", "int8", "--train"], "no gradient; accepted with --train: f32, bf16"),
        (["--dtype", "int2"], "accepted: f32, bf16, int8, int4"),
        (["--dtype", "f8"], "--dtype 'f8': accepted: f32, bf16"),
        (["--prompt-len", "300"], "reach 256 tokens"),
        (["recipe.tokens=3"], "overrides here begin with model."),
        (["--train", "--seq", "999"], "accepted: up to 256"),
    ],
)
def test_what_is_refused(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpt-11m", *args]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
