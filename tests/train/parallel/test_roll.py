"""Who is gone, when the store that could tell is gone as well."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from assay.train.parallel import roll
from assay.train.parallel.roll import Lost, Roll, guarded


class Silent:
    """A store behind a network that is cut: what asks it is not answered, for much longer than anyone waits."""

    def check(self, keys: list[str]) -> bool:
        return threading.Event().wait(6.0)

    def set(self, key: str, value: str) -> None:
        threading.Event().wait(6.0)


def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll, "CALL_S", 0.02)
    monkeypatch.setattr(roll, "BEAT_S", 0.01)
    store: Any = Silent()
    start = time.monotonic()
    with pytest.raises(Lost, match="process 0, on whose machine"), guarded(Roll(store, 1, 2)):
        raise dist.DistError("connection timed out")
    assert time.monotonic() - start < 3.0
