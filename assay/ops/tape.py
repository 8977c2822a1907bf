"""A step written down once and run again: compiled kernels in one call, torch's operations without what led to them.

What a forward pass in Python costs a layer does not depend on the numbers: modules are entered, shapes read, views
made. For steps that differ only in the contents of their tensors, a tape keeps the calls themselves, on buffers that
stay where they are, as CUDA graphs do on a device. It holds for every part: none looks at the contents of a tensor.
"""

from __future__ import annotations

import ctypes
import struct
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
LEFT = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.lift_fresh.default,
}
REFUSED = (torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
MAPPED: Mapping[Any, str] = {aten.add.Tensor: "add", aten.mul.Tensor: "mul"}
WHOLE, ALONE = 64, 1 << 15

OWN = "assay::"  # before the names of compiled kernels, where torch's stand beside them
# What a field of a dataclass is to a tape: read by nobody while layers run, or written where it stands.
HOST, LIVE = {"tape": "host"}, {"tape": "live"}


class Unrecordable(Exception):
    """Why a step cannot be run again from a tape, in words."""


class Entry(ctypes.Structure):
    """As the library has it: a kernel, and its arguments, a word of 8 bytes each."""

    _fields_ = [("run", ctypes.c_void_p), ("words", ctypes.c_void_p)]


class Kernel:
    """A compiled function and the types of its arguments, called with any that ctypes takes."""

    def __init__(self, library: ctypes.CDLL, name: str, types: Sequence[type]) -> None:
        self.name, self.types = name, types
        self.call = getattr(library, f"assay_{name}")
        self.call.argtypes, self.call.restype = types, None
        self.again = ctypes.cast(getattr(library, f"assay_again_{name}"), ctypes.c_void_p).value

    def __call__(self, *args: Any) -> None:
        if torch._C._autograd._profiler_enabled():
            with torch.profiler.record_function(OWN + self.name):
                self.call(*args)
        else:
            self.call(*args)
        if torch._C._len_torch_dispatch_stack() and (tape := recorder()) is not None:
            tape.kernel(self, args)

    def words(self, args: Sequence[Any]) -> bytes:
        return b"".join(_word(kind, value) for kind, value in zip(self.types, args, strict=True))


def _word(kind: type, value: Any) -> bytes:
    if isinstance(value, ctypes.Array):
        return struct.pack("q", ctypes.addressof(value))
    if kind is ctypes.c_float:
        return struct.pack("fi", value, 0)
    return struct.pack("q", int(value or 0))


class Program:
    """Kernels behind one another, in one call of the library."""

    def __init__(self, library: ctypes.CDLL, calls: Sequence[tuple[Kernel, Sequence[Any]]]) -> None:
        self._run = library.assay_run
        self._run.argtypes, self._run.restype = (ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p), None
        self.names = [kernel.name for kernel, _ in calls]
        self.given = [args for _, args in calls]  # kept: words may point to what is in them
        self._words = [ctypes.create_string_buffer(kernel.words(args), 8 * len(args)) for kernel, args in calls]
        entries = (Entry(k.again, ctypes.addressof(w)) for (k, _), w in zip(calls, self._words, strict=True))
        self._entries = (Entry * len(calls))(*entries)

    def __call__(self) -> None:
        self._run(self._entries, len(self.names), None)

    def timed(self) -> list[tuple[str, float]]:
        """The same, and what each of them took in seconds."""
        took = (ctypes.c_double * len(self.names))()
        self._run(self._entries, len(self.names), took)
        return list(zip(self.names, took, strict=True))


class Again:
    """An operation of torch on the same tensors; `out` is where a result goes that no overload writes there itself."""

    def __init__(self, func: Any, args: Any, kwargs: Any, out: Tensor | None = None) -> None:
        self.func, self.args, self.kwargs, self.out = func, args, kwargs, out

    @property
    def name(self) -> str:
        return str(self.func.overloadpacket.__name__)

    def __call__(self) -> None:
        found = self.func(*self.args, **self.kwargs)
        if self.out is not None:
            self.out.copy_(found)


Noted = tuple[Kernel, Sequence[Any]] | Again


class Recorder(TorchDispatchMode):
    """Writes down what a step computes while it computes it. `tape` afterwards; Unrecordable where it cannot be."""

    def __init__(self, library: ctypes.CDLL, kernels: Mapping[str, Kernel]) -> None:
        super().__init__()
        self.library, self.kernels = library, kernels
        self.entries: list[Noted] = []
        self.kept: list[Any] = []  # tensors, so that no buffer is used for anything else
        self.written: set[int] = set()
        self.own: dict[int, int] = {}  # bytes of what operations have made, by where it stands
        self.filled: dict[int, Again] = {}  # what was made of nothing: done again only where it is written over
        self.reason: str | None = None

    def kernel(self, kernel: Kernel, args: Sequence[Any]) -> None:
        self.entries.append((kernel, args))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.kept += [args, kwargs, out]
        found = {_place(t) for t in (*tensors(args), *tensors(kwargs))}
        self.own |= {_place(t): t.untyped_storage().nbytes() for t in tensors(out) if _place(t) not in found}
        if func not in LEFT:
            self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        given = {_place(t) for t in (*tensors(args), *tensors(kwargs))}
        made = {_place(t) for t in tensors(out)}
        if made and made <= given and not func._schema.is_mutable:
            return  # a view
        if any(tag in func.tags for tag in REFUSED) and not by_number(func, args):
            self.reason = f"{func}: its result is not the same, or not as large, for other contents"
        elif not made and not func._schema.is_mutable:
            pass  # a number that does not follow from contents
        elif self._as_kernel(func, args, kwargs, out):
            pass
        elif func._schema.is_mutable:
            self.entries.append(Again(func, args, kwargs))
            given_to = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
            rules = (a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
            self.written |= {_place(t) for rule in rules for t in tensors(given_to.get(rule.name))}
        elif isinstance(out, Tensor):
            entry = rewritten(func, args, kwargs, out)
            self.entries.append(entry)
            if next(tensors((*args, *kwargs.values())), None) is None:
                self.filled[_place(out)] = entry
        else:
            self.entries += [
                Again(_Item(func, i), args, kwargs, one) for i, one in enumerate(out) if isinstance(one, Tensor)
            ]

    def _as_kernel(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """Simple operations join the kernels beside them: the same bits, without a call of torch between."""
        given: tuple[Any, ...]
        if func in MAPPED and not kwargs and alike(*args, out):
            x, y = args
            given = (out.dtype is torch.bfloat16, x.data_ptr(), y.data_ptr(), out.data_ptr(), out.numel())
            self.entries.append((self.kernels[MAPPED[func]], given))
            return True
        if func is aten.silu.default and alike(*args, out) and alone(out) and agrees(self.kernels["silu"], out.dtype):
            given = (out.dtype is torch.bfloat16, args[0].data_ptr(), out.data_ptr(), out.numel())
            self.entries.append((self.kernels["silu"], given))
            return True
        if func is aten.index_copy_.default and rows_apart(*args):
            into, _, index, source = args
            size = into[0].numel() * into.element_size()
            given = (into.data_ptr(), index.data_ptr(), index.shape[0], source.data_ptr(), size)
            self.entries.append((self.kernels["put"], given))
            self.written.add(_place(into))
            return True
        return False

    def tape(self) -> Tape:
        if self.reason is not None:
            raise Unrecordable(self.reason)
        constant = {id(entry) for place, entry in self.filled.items() if place not in self.written}
        entries = [entry for entry in self.entries if id(entry) not in constant]
        return Tape(self.library, entries, self.kept, sum(self.own.values()))


class Tape:
    """What was written down: the step again, on the tensors it was recorded with. held: bytes that are its own."""

    def __init__(self, library: ctypes.CDLL, entries: Sequence[Noted], kept: Sequence[Any], held: int = 0) -> None:
        self._kept, self.held = kept, held
        self.steps: list[Program | Again] = []
        run: list[tuple[Kernel, Sequence[Any]]] = []
        for entry in (*entries, None):
            if isinstance(entry, tuple):
                run.append(entry)
                continue
            if run:
                self.steps.append(Program(library, run))
                run = []
            if entry is not None:
                self.steps.append(entry)

    def run(self) -> None:
        for step in self.steps:
            step()

    def timed(self) -> list[tuple[str, float]]:
        """The same, and the seconds of each kernel and operation."""
        found = []
        for step in self.steps:
            if isinstance(step, Program):
                found += [(OWN + name, took) for name, took in step.timed()]
                continue
            start = time.perf_counter()
            step()
            found.append((f"aten::{step.name}", time.perf_counter() - start))
        return found

    def addresses(self) -> Iterator[int]:
        """The words that kernels are given, lists of them opened: the addresses of what is read are among them."""
        for program in (step for step in self.steps if isinstance(step, Program)):
            for value in (value for args in program.given for value in args):
                yield from value if isinstance(value, ctypes.Array) else [int(value or 0)]

    def reads(self, given: Sequence[Tensor]) -> list[bool]:
        """Which of these tensors a run looks at: a kernel is given an address in it, or an operation is given it."""
        words = sorted(set(self.addresses()))
        torchs = {_place(t) for a in self.steps if isinstance(a, Again) for t in (*tensors(a.args), *tensors(a.kwargs))}
        found = []
        for t in given:
            first = t.untyped_storage().data_ptr()
            at = bisect_left(words, first)
            inside = at < len(words) and words[at] < first + max(1, t.untyped_storage().nbytes())
            found.append(inside or first in torchs)
        return found

    def counts(self) -> Counter[str]:
        """Kernels and operations of a run, by name."""
        return Counter(
            name for step in self.steps for name in (step.names if isinstance(step, Program) else [step.name])
        )


class _Item:
    """One of several results."""

    def __init__(self, func: Any, number: int) -> None:
        self.func, self.number, self.overloadpacket = func, number, func.overloadpacket

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = self.func(*args, **kwargs)[self.number]
        return found


def recorder() -> Recorder | None:
    """The recorder that looks on, if nobody else does."""
    alone = torch._C._len_torch_dispatch_stack() == 1
    found = torch._C._get_dispatch_stack_at(0) if alone else None
    return found if isinstance(found, Recorder) else None


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors(one)


def _place(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def alike(*given: Any) -> bool:
    """Dense tensors of one shape and of one of the types that kernels have."""
    if not all(isinstance(t, Tensor) for t in given):
        return False
    dtype, shape = given[0].dtype, given[0].shape
    same = all(t.dtype is dtype and t.shape == shape and t.is_contiguous() for t in given)
    return same and dtype in (torch.float32, torch.bfloat16)


def alone(t: Tensor) -> bool:
    """Whether torch's pointwise loops take all of it in whole vectors, on one thread."""
    return t.numel() % WHOLE == 0 and t.numel() <= ALONE


def by_number(func: Any, args: Any) -> bool:
    """A look-up of entries by their numbers; how many entries a mask leaves follows from its contents."""
    return func is aten.index.Tensor and all(t.dtype not in (torch.bool, torch.uint8) for t in tensors(args[1]))


def rows_apart(into: Tensor, dim: int, index: Tensor, source: Tensor) -> bool:
    dense = all(t.is_contiguous() for t in (into, index, source))
    return dense and dim == 0 and index.dim() == 1 and index.dtype is torch.int64 and into.dtype is source.dtype


@cache
def agrees(kernel: Kernel, dtype: torch.dtype) -> bool:
    """Whether the kernel has torch's bits for SiLU, of every bfloat16 and, in float32, of as many numbers of all
    sizes: torch's exponential is another one on other machines."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    x = bits.to(torch.int16).view(torch.bfloat16) if dtype is torch.bfloat16 else (bits * 65521).view(torch.float32)
    for part in x.split(ALONE // 2):
        mine, torchs = torch.empty_like(part), torch.nn.functional.silu(part)
        kernel(dtype is torch.bfloat16, part.data_ptr(), mine.data_ptr(), part.numel())
        if not torch.equal(mine.nan_to_num(7.0), torchs.nan_to_num(7.0)) or not torch.equal(mine < 0, torchs < 0):
            return False
    return True


def rewritten(func: Any, args: Any, kwargs: Any, out: Tensor) -> Again:
    """The operation with its result where it was."""
    found = into(func)
    if found is None:
        return Again(func, args, kwargs, out)
    return Again(found[0], args, {**kwargs, found[1]: out})


@cache
def into(func: Any) -> tuple[Callable[..., Any], str] | None:
    """The overload that writes to a given tensor, and the name it has for it."""
    own = [(a.name, str(a.type)) for a in func._schema.arguments]
    for name in func.overloadpacket.overloads():
        found = getattr(func.overloadpacket, name)
        outs = [a.name for a in found._schema.arguments if a.is_out]
        rest = [(a.name, str(a.type)) for a in found._schema.arguments if not a.is_out]
        if len(outs) == 1 and rest == own:
            return found, outs[0]
    return None
