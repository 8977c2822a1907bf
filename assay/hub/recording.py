"""What happens inside a model of transformers while it runs: outputs of modules, and every call of its attention."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn


def flat(x: Tensor) -> Tensor:
    """[R, T, ...] -> [R * T, ...]; what is flat already stays."""
    return x.flatten(0, 1) if x.dim() == 3 else x


def routed(prefix: str, given: Sequence[Tensor]) -> dict[str, Tensor]:
    """A router's logits and choices: transformers returns (logits, shares, experts), or the logits alone."""
    found = {f"{prefix}logits": flat(given[0])} if given else {}
    chosen = next((t for t in given if not t.is_floating_point()), None)
    return found if chosen is None else found | {f"{prefix}choice": flat(chosen)}


class Recorder:
    """Records the first input and all outputs of modules by name while it is open."""

    def __init__(self, model: nn.Module, names: Any) -> None:
        self.model, self.names = model, frozenset(names)
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, tuple[Tensor, ...]] = {}

    def __enter__(self) -> Recorder:
        there = dict(self.model.named_modules())
        self.handles = [
            there[name].register_forward_hook(self._hook(name), with_kwargs=True)
            for name in sorted(self.names & there.keys())
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = [*args, *kwargs.values()]
            self.inputs[name] = next(x for x in given if isinstance(x, Tensor))
            outputs = output if isinstance(output, tuple) else (output,)
            self.outputs[name] = tuple(x for x in outputs if isinstance(x, Tensor))

        return hook


@contextlib.contextmanager
def attention(model: nn.Module) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Records q and k after the turn, the shares and the mixed values of every call of the family's own eager
    attention, by module; nothing for a family that has no such function."""
    home = sys.modules[type(model).__module__]
    own = getattr(home, "eager_attention_forward", None)
    names = {module: name for name, module in model.named_modules()}
    calls: dict[str, dict[str, Tensor]] = {}

    def call(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **more: Any) -> Any:
        mix, shares = own(module, query, key, *rest, **more)  # type: ignore[misc]
        turned = {"q": query, "k": key, "scores": shares}
        calls[names[module]] = {n: t.transpose(1, 2).flatten(0, 1) for n, t in turned.items()}
        calls[names[module]]["mix"] = mix.flatten(0, 1)
        return mix, shares

    if own is not None:
        home.eager_attention_forward = call  # type: ignore[attr-defined]
    try:
        yield calls
    finally:
        if own is not None:
            home.eager_attention_forward = own  # type: ignore[attr-defined]
