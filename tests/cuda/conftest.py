"""Tests on a CUDA device; without one they are skipped, and say why, but for those that Triton's interpreter runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if HERE in item.path.parents and not (interpreted and item.path.name == "test_triton.py"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: torch finds none here"))
