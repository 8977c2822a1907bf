"""The compiled library: where it stands, when it is made again, and what is said where it cannot be."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from assay.ops import native
from assay.ops.native import Unbuildable, build


def fake(tmp_path: Path, body: str) -> str:
    """A compiler that counts its calls, one letter each."""
    path = tmp_path / "cxx"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo 1; exit; fi\necho x >> {tmp_path}/calls\n{body}\n')
    path.chmod(0o755)
    return str(path)


# The last argument but one, or the one behind -o, is where the output goes.
MAKES = 'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo made > "$2"; fi; shift; done'


def test_it_is_compiled_once_and_again_for_another_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = fake(tmp_path, MAKES)
    home = tmp_path / "cache"
    first = build.library(home, tool)
    assert first.read_text() == "made\n" and home.stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err.count("\n") == 1
    assert build.library(home, tool) == first and capsys.readouterr().err == ""
    assert (tmp_path / "calls").read_text().count("x") == 2  # the unit, then the library
    source = tmp_path / "other.cpp"
    source.write_text("other")
    monkeypatch.setattr(build, "SOURCE", source)
    assert build.library(home, tool) != first
    assert sorted(p.name for p in home.iterdir() if p.suffix != ".so") == ["lock"]


def test_who_finds_it_does_not_wait_for_another_to_be_compiled(tmp_path: Path) -> None:
    tool, home = fake(tmp_path, MAKES), tmp_path / "cache"
    first = build.library(home, tool)
    with (home / "lock").open("a") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = pool.submit(build.library, home, tool)
        try:
            assert found.result(10) == first
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)


def test_a_failed_build_leaves_nothing_and_says_what_the_compiler_said(tmp_path: Path) -> None:
    tool = fake(tmp_path, "echo 'kernels.cpp:1: error: no such thing' >&2; exit 1")
    with pytest.raises(Unbuildable, match="no such thing"):
        build.library(tmp_path / "cache", tool)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["lock"]


def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    tool = fake(tmp_path, MAKES)
    home = tmp_path / "cache"
    home.mkdir()
    home.chmod(0o755)
    with pytest.raises(Unbuildable, match="0700"):
        build.library(home, tool)


def test_without_a_compiler_torch_is_used_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native, "ENVIRONMENT", replace(native.ENVIRONMENT, native=True))
    monkeypatch.setattr(build, "ENVIRONMENT", replace(build.ENVIRONMENT, compiler=None))
    native.kernels.cache_clear()
    try:
        with torch.inference_mode():
            assert native.serving(torch.ones(1)) is None and native.serving(torch.ones(1)) is None
    finally:
        native.kernels.cache_clear()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "compiler" in said and "g++" in said


@pytest.mark.parametrize("setting", ["0", None])
def test_the_environment_switches_it_off_before_anything_is_compiled(tmp_path: Path, setting: str | None) -> None:
    env = {name: value for name, value in os.environ.items() if name != "ASSAY_NATIVE"}
    env |= {"ASSAY_CACHE": str(tmp_path), "CXX": fake(tmp_path, "exit 1")} | (
        {} if setting is None else {"ASSAY_NATIVE": setting}
    )
    code = "from assay.ops import native; print(native.kernels())"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
    assert (tmp_path / "calls").exists() == (setting is None)
