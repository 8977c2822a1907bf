"""What trackers hold, read by their own readers, is what metrics.jsonl has."""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from assay.train.folder import METRICS, read_metrics
from assay.train.loop import Options, train
from assay.train.tracking.base import kinds, public, told
from tests.train.small import model, recipe
from tests.train.test_resume import stop_at

SECRET = "hunter2-secret"


def expected(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(row["step"], float(row[name])) for row in read_metrics(folder / METRICS) if name in row]


def close(found: list[tuple[int, float]], wanted: list[tuple[int, float]]) -> bool:
    """Some keep float32."""
    return [s for s, _ in found] == [s for s, _ in wanted] and [v for _, v in found] == pytest.approx(
        [v for _, v in wanted], rel=1e-6
    )


def run(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after three steps and taken up again."""
    monkeypatch.setenv("WANDB_API_KEY", SECRET * 4)
    monkeypatch.setenv("MY_PASSWORD", SECRET)
    options = Options(report_s=0.0, track=kinds(kind))
    with pytest.raises(KeyboardInterrupt):
        train(model(), recipe(), folder, on_progress=stop_at(3), options=options)
    train(model(), recipe(), folder, resume=True, options=options)
    assert len(expected(folder, "loss_nats")) == 8
    for path in folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, "tensorboard", monkeypatch)
    made = EventAccumulator(str(tmp_path / "tensorboard"))
    made.Reload()
    for name in ("loss_nats", "grad_norm", "lr", "valid_nats"):
        assert close([(e.step, e.value) for e in made.Scalars(name)], expected(tmp_path, name)), name
    assert "spec/text_summary" in made.Tags()["tensors"]


@pytest.mark.slow  # its database is made step by step
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run(tmp_path, "mlflow", monkeypatch)
    client = MlflowClient(uri)
    (place,) = [e for e in client.search_experiments() if e.name == "assay"]
    (found,) = client.search_runs([place.experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["recipe.tokens"] == "512"
    for name in ("loss_nats", "valid_nats"):
        history = client.get_metric_history(found.info.run_id, name)
        assert close(sorted((m.step, m.value) for m in history), expected(tmp_path, name)), name


def records(data: bytes) -> Iterator[bytes]:
    """The entries of a LevelDB log after wandb's head of 7 bytes: blocks of 32 KiB, pieces of (crc, length, type)."""
    at, held = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        held = (held if kind in (3, 4) else b"") + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield held


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record of a run without a network: a log of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    written: Any = wandb_internal_pb2
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(tmp_path, "wandb", monkeypatch)
    wanted, until = expected(tmp_path, "loss_nats"), time.monotonic() + 30
    while len((found := logged(tmp_path, written.Record))["loss_nats"]) < len(wanted):
        assert time.monotonic() < until, found  # its own process writes the last records when the run has ended
        time.sleep(0.1)
    assert close(found["loss_nats"], expected(tmp_path, "loss_nats"))
    assert close(found["valid_nats"], expected(tmp_path, "valid_nats"))


def logged(folder: Path, message: Any) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {"loss_nats": [], "valid_nats": []}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):  # named by the second that they began in
        for data in records(path.read_bytes()):
            record = message()
            record.ParseFromString(data)
            row = {(i.key or i.nested_key[0]): float(i.value_json) for i in record.history.item}
            for name in found.keys() & row.keys():
                found[name].append((int(row["step"]), row[name]))
    return found


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow"])
def test_one_that_is_not_installed_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == kind]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(ModuleNotFoundError) as error:
        train(model(), recipe(), tmp_path, options=Options(track=kinds(kind)))
    assert str(error.value.name).partition(".")[0] == kind


def test_names_and_what_is_public() -> None:
    assert kinds("") == () and kinds("wandb, mlflow") == ("wandb", "mlflow")
    with pytest.raises(ValueError, match="'neptune'; accepted: tensorboard, wandb, mlflow"):
        kinds("neptune")
    with pytest.raises(ValueError, match="given twice"):
        kinds("wandb,wandb")
    assert told({"step": 3, "tokens": 8, "loss_nats": 1.5}) == {"tokens": 8.0, "loss_nats": 1.5}
    assert public("s3://me:secret@host/a") == "s3://host/a" and public("a@b") == "a@b" and public(3) == 3
    assert recipe(track=["wandb"]).computed == recipe() and recipe(track=["wandb"]).digest == recipe().digest
