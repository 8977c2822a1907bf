"""Compiling the kernels for this machine, once: a shared library in a private folder of the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from assay.spec.environment import ENVIRONMENT

SOURCE = Path(__file__).with_name("kernels.cpp")  # it includes the headers beside it
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp")
CPUINFO = Path("/proc/cpuinfo")


class Unbuildable(Exception):
    """Why there is no library, in words."""


def compiler(chosen: str | None = None) -> str:
    """The one chosen, $CXX, g++ or c++, whichever is there first. Unbuildable where none is."""
    for name in (chosen, ENVIRONMENT.compiler, "g++", "c++"):
        found = shutil.which(name) if name else None
        if found is not None:
            return found
    raise Unbuildable("no C++ compiler was found (g++ is what is needed)")


def runtime() -> Path | None:
    """The OpenMP library that torch brings: with a second one, two pools of threads would fight for the cores."""
    return next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))), None)


def key(tool: str) -> str:
    """Differs wherever the library could: source, flags, compiler, torch, and what this CPU can do."""
    version = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout
    lines = CPUINFO.read_text("utf-8", "replace").splitlines() if CPUINFO.is_file() else []
    able = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    sources = (path.read_text("utf-8") for path in sorted((SOURCE, *SOURCE.parent.glob("*.h"))))
    told = (*sources, *FLAGS, version, torch.__version__, platform.machine(), able, str(runtime()))
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:24]


def private(place: Path) -> Path:
    """The folder, made if need be. Unbuildable where somebody else could put a library into it."""
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = place.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise Unbuildable(f"{place} is not this user's alone (mode 0700 is what is needed)")
    return place


def library(place: Path = ENVIRONMENT.cache / "native", chosen: str | None = None) -> Path:
    """The kernels as this compiler makes them: found under their key, or built now. Unbuildable says why not."""
    try:
        tool = compiler(chosen)
        home = private(place)
        found = home / f"kernels-{key(tool)}.so"
        if not found.is_file():  # it comes into its place whole, so that who finds it waits for nobody
            with (home / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not found.is_file():
                    _build(tool, found)
    except OSError as error:
        raise Unbuildable(str(error)) from error
    return found


def _build(tool: str, target: Path) -> None:
    print("assay: compiling kernels for this CPU, once ...", end="", file=sys.stderr, flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        unit, made, openmp = Path(work) / "kernels.o", Path(work) / target.name, runtime()
        try:
            _run([tool, *FLAGS, "-c", str(SOURCE), "-o", str(unit)])
            _run([tool, "-shared", str(unit), "-o", str(made), "-fopenmp" if openmp is None else str(openmp)])
            os.replace(made, target)
        finally:
            print(f" {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [*(done.stderr or done.stdout).strip().splitlines(), f"status {done.returncode}"]
        raise Unbuildable(f"{command[0]}: {next((line for line in said if 'error' in line), said[0])}")
