"""The scan of the package, and what `--part FILE.py` accepts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from assay.spec import registry
from assay.spec.base import SLOTS

PART = '''
from typing import Literal
from assay.spec.base import FfnSpec
class Twice(FfnSpec):
    """x -> 2 x."""
    kind: Literal["{kind}"] = "{kind}"
'''


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """What a test loads is gone after it."""
    before = set(sys.modules)
    yield
    registry._user_parts.cache_clear()
    for name in set(sys.modules) - before:
        if name.startswith(registry.USER):
            del sys.modules[name]


def loads(path: Path, times: int = 1, *more: Path) -> str:
    """What loading says: the kinds that are there afterwards, or the error."""
    try:
        for file in (path, *more) * times:
            registry.load_file(file)
    except Exception as error:
        return f"{type(error).__name__} {error}"
    return registry.names("ffns")


def test_the_scan_finds_every_file() -> None:
    """One kind for each file of a slot's folder, named without a list anywhere."""
    for slot in SLOTS:
        files = {p.stem for p in (registry.PARTS / slot).glob("[!_]*.py")}
        own = (kind.__module__ for kind in registry.table(slot).values())  # and what other tests have loaded from files
        modules = {name.rpartition(".")[2] for name in own if name.startswith("assay.parts.")}
        assert modules == files and files, slot


def test_a_kind_that_is_not_there() -> None:
    with pytest.raises(
        ValueError, match=r"unknown norms kind 'layer_norm' \(did you mean 'layernorm'\?\); accepted: b"
    ):
        registry.get("norms", "layer_norm")
    with pytest.raises(ValueError, match="unknown norms kind 3; accepted"):
        registry.get("norms", 3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (PART.format(kind="twice"), "dense, gated, moe, ngpt, per_layer, product_keys, rwkv_channel, twice"),
        (PART.format(kind="moe"), "kind 'moe' is already taken in ffns"),
        (
            PART.format(kind="twice") + PART.format(kind="twice").replace("Twice", "Again"),
            "kind 'twice' is already taken in ffns",
        ),
        ("x = 1", "defines no part and no task; it needs a class derived from one of mixers, ffns"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def (", "SyntaxError"),
        ("import assay.no_such_module", "ModuleNotFoundError"),
    ],
)
def test_a_file_of_ones_own(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    told = loads(path)
    assert says in told
    assert told.startswith(("dense", f"ValueError --part {path}: "))


def test_the_same_file_twice_and_no_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(PART.format(kind="twice"))
    assert loads(path, times=2) == "dense, gated, moe, ngpt, per_layer, product_keys, rwkv_channel, twice"
    assert loads(tmp_path / "none.py").startswith("FileNotFoundError --part: no file")
    elsewhere = tmp_path / "other" / "mine.py"
    elsewhere.parent.mkdir()
    elsewhere.write_text(path.read_text())
    assert f"a file of this name is already loaded, {path}" in loads(path, 1, elsewhere)
    another = path.with_name("another.py")
    another.write_text(path.read_text())
    assert "kind 'twice' is already taken in ffns" in loads(path, 1, another)
    (tmp_path / "text.txt").write_text("x")
    assert "is not a Python file" in loads(tmp_path / "text.txt")
