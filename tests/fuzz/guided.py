"""`python -m tests.fuzz.guided NAME FOLDER [libFuzzer's options]`: a search guided by coverage, from good files.

The good files are put into FOLDER, which keeps what reaches new lines, so that a search goes on where it was. It needs
atheris, which is no dependency.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["assay.data.settings", "assay.hub", "assay.spec.load"]):
    from assay.hub.family import families, find
    from tests.fuzz.targets import holds

    for kind in families():
        find(kind)  # read when they are wanted, which would be too late to be seen

from tests.fuzz.test_configs import VALUES, places, put, written
from tests.fuzz.test_fuzz import seed


def main() -> None:
    name, folder = sys.argv.pop(1), Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(good(name)):
        (folder / f"good-{i}").write_bytes(data)
    own = {"custom_mutator": another_value} if name == "config" else {}
    atheris.Setup(sys.argv, lambda data: holds(name, data) and None, **own)
    atheris.Fuzz()


def good(name: str) -> list[bytes]:
    """The good file, and for configurations one of every family."""
    return [seed(name), *(written(kind).encode() for kind in families() if name == "config")]


def another_value(data: bytes, most: int, number: int) -> bytes:
    """Three of four times another value at one place of a configuration, or a number beside it; else any bytes."""
    draw = random.Random(number)
    try:
        tree = json.loads(data)
        place = draw.choice(list(places(tree)))
    except (ValueError, AttributeError, IndexError, RecursionError):
        return atheris.Mutate(data, most)
    if draw.random() < 0.25:
        return atheris.Mutate(data, most)
    value = draw.choice((*VALUES, *range(9)))
    put(tree, place if draw.random() < 0.9 else (*place[:-1], "text_config"), value)
    return json.dumps(tree).encode()[:most]


if __name__ == "__main__":
    main()
