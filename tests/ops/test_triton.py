"""Triton's kernels without a GPU: run by its interpreter, and compiled for one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape)


@pytest.mark.slow
def test_they_pass_their_tests_in_the_interpreter() -> None:
    """In a process of its own: whether kernels are interpreted is decided once, when `triton` is imported."""
    pytest.importorskip("triton")
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda/test_triton.py"]
    done = subprocess.run(run, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout


@pytest.mark.slow
def test_they_compile_for_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To machine code of sm_90, with the arguments that they are launched with; none of it is run."""
    triton = pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    from assay.ops import packed
    from assay.ops.native.scans import Streams
    from assay.ops.state import Rows
    from assay.ops.triton.launch import Launched

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(JITFunction, "__getitem__", lambda fn, _: lambda *a, **k: launches.append((fn, a, k)))
    kernels, pool, q = Launched(), drawn(9, 16, 2, 64).bfloat16(), drawn(2, 8, 64).bfloat16()
    table, seen = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 64, dtype=torch.bool)
    kernels.attend(q, (pool, pool), seen, 0.1, 3.0, drawn(8), table)
    for bits in packed.BITS:
        kernels.packed(drawn(3, 70).bfloat16(), [(packed.pack(drawn(20, 70), bits), drawn(20).bfloat16())])
        kernels.grouped(drawn(3, 70), packed.pack(drawn(2, 20, 70), bits), torch.tensor([1, 2]))
    x, past = drawn(2, 3, 4, 32), Rows(drawn(2, 4, 32, 32), torch.arange(2))
    kernels.scans.scan(past, Streams(x, x, x, -drawn(2, 3, 4, 32).abs(), rate=drawn(2, 3, 4), skip=drawn(1, 1, 4)))
    kernels.scans.scan(past, Streams(x, decay=-drawn(2, 3, 4).abs(), a=x, b=x, s=x, rate=drawn(2, 3, 4)), True)
    assert {fn.fn.__name__ for fn, _, _ in launches} == {
        "piece_kernel", "merge_kernel", "round_kernel", "packed_kernel", "scan_kernel"
    }  # fmt: skip
    for launch in launches:
        assert "cubin" in compiled(triton, *launch).asm


def compiled(triton: Any, fn: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """As a launch would compile it, on a machine that has the device."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    bound, special, chosen = create_function_from_signature(fn.signature, fn.params, backend)(*args, **options)
    made, signature, constants, attributes = fn._pack_args(backend, options, bound, special, chosen)
    return triton.compile(ASTSource(fn, signature, constants, attributes), target=target, options=made.__dict__)
