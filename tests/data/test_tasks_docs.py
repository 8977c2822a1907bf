"""The page about the tasks names each with the floor that it has."""

from __future__ import annotations

import re
from pathlib import Path

from assay.data.tasks.base import tasks

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"


def test_the_table_has_every_task_and_its_floor() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d\.\d{4}) \|[^|]*\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted((kind, f"{task().floor:.4f}") for kind, task in tasks().items())
