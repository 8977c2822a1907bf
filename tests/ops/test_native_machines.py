"""The compiled kernels on processors that are not this one: built for them, and run where that is possible."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from assay.ops.native.build import FLAGS, SOURCE

pytestmark = pytest.mark.slow
DRIVER = Path(__file__).parent / "native" / "driver.cpp"
ABLE = torch.cpu.get_capabilities()
# What a processor must have to run what is built for it.
INTEL = {
    "x86-64-v2": (),
    "haswell": ("avx2",),
    "skylake-avx512": ("avx512_f", "avx512_bw"),
    "cascadelake": ("avx512_f", "avx512_bw", "avx512_vnni"),
    "cooperlake": ("avx512_f", "avx512_bw", "avx512_vnni", "avx512_bf16"),
    "sapphirerapids": ("avx512_f", "avx512_bf16", "amx_bf16", "avx512_fp16"),
}


def built(tool: str, place: Path, *flags: str) -> Path:
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool}")
    own = [flag for flag in FLAGS if flag not in ("-O3", "-march=native", "-fPIC")]
    command = [tool, *own, "-O2", *flags, "-I", str(SOURCE.parent), str(DRIVER), "-o", str(place)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return place


def told(*command: str) -> dict[str, list[str]]:
    """Of each kernel, the hashes of its results; it fails where one is off a plain loop in double."""
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        name, _, bits = line.split()
        found.setdefault(name, []).append(bits)
    return found


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return told(str(built("g++", tmp_path_factory.mktemp("native") / "driver", "-march=native")))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
@pytest.mark.parametrize("machine", INTEL)
def test_registers_of_any_width_give_the_same_bits(machine: str, here: dict[str, list[str]], tmp_path: Path) -> None:
    """Where there is a fused multiply-add; without one every result is still near its loop in double."""
    program = built("g++", tmp_path / "driver", f"-march={machine}")
    if not all(ABLE.get(name) for name in INTEL[machine]):
        pytest.skip(f"compiled; not run: this processor has not all of {', '.join(INTEL[machine])}")
    found = told(str(program))
    assert found == here if ABLE.get("fma3") and machine != "x86-64-v2" else found.keys() == here.keys()


@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="no qemu-aarch64-static to run it with")
def test_an_arm_processor_gives_the_same_bits(here: dict[str, list[str]], tmp_path: Path) -> None:
    """NEON, emulated."""
    program = built("aarch64-linux-gnu-g++", tmp_path / "driver", "-static")
    assert told("qemu-aarch64-static", str(program)) == here
