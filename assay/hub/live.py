"""A checkpoint in transformers itself, as the reference that an import is compared with. Needs the extra `hf`.

float32, eager attention, files of the folder only, and no code from it.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from assay.hub.family import copies
from assay.hub.load import CONFIG, spelled
from assay.hub.rules import Pairs, Place, Rule
from assay.spec.model import ModelSpec

Told = Callable[[int, int], None]
PADDED = 12  # columns of the padded batch
GREEDY = 8  # tokens of the greedy continuation


@dataclass(frozen=True)
class Live:
    """transformers' model, and which of its modules is which of ours. `rules`: how q and k are laid out."""

    model: nn.Module
    spec: ModelSpec
    modules: Mapping[str, str]
    rules: Mapping[str, tuple[Rule, Place]]

    @torch.no_grad()
    def reference(self, ids: Int[Tensor, "R T"], told: Told | None = None) -> dict[str, Tensor]:
        """What `assay.measure.parity` reads: the input, hidden states, logits, padded batches and a greedy reply."""
        layers = [self.modules[f"blocks.{i}"] for i in range(self.spec.layers) if f"blocks.{i}" in self.modules]
        final = self.modules.get("final_norm")
        found: dict[str, Tensor] = {"input_ids": ids}
        with Recorder(self.model, [*layers, *([final] if final else [])]) as seen:
            found["logits"] = self._logits(ids)
        for i, name in enumerate(layers if len(layers) == self.spec.layers else ()):
            found[f"hidden.{i}"], found[f"hidden.{i + 1}"] = seen.inputs[name], seen.outputs[name][0]
        if final is not None:
            found["final"] = seen.outputs[final][0]
        for side in ("left", "right"):
            found |= {f"{side}pad.{name}": value for name, value in self._padded(ids, side).items()}
        return found | self._greedy(ids, told)

    def _logits(self, ids: Tensor, **more: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False, **more).logits

    def _padded(self, ids: Tensor, side: str) -> dict[str, Tensor]:
        """Two rows of unequal length; padding is token 0."""
        width = min(PADDED, ids.shape[1])
        short, column = width - width // 3, torch.arange(width)
        keep = torch.stack([column >= width - short if side == "left" else column < short, column >= 0])
        rows = torch.zeros(2, width, dtype=ids.dtype)
        for row, mask in enumerate(keep):
            rows[row, mask] = ids[row % len(ids), : int(mask.sum())]
        mask = keep.long()
        more = {"attention_mask": mask}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return {"input_ids": rows, "attention_mask": mask, "logits": self._logits(rows, **more)}

    def _greedy(self, ids: Tensor, told: Told | None) -> dict[str, Tensor]:
        """The likeliest token, again and again, each from the whole text so far: no cache has a part in it."""
        logits: list[Tensor] = []
        for done in range(GREEDY):
            logits.append(self._logits(ids)[:, -1])
            ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
            if told is not None:
                told(done + 1, GREEDY)
        return {"greedy_ids": ids[:, -GREEDY:], "greedy_logits": torch.stack(logits, 1)}

    @torch.no_grad()
    def inside(self, layer: int, ids: Int[Tensor, "R T"]) -> dict[str, Tensor]:
        """What happens inside a block, under our names within it, flat: `mixer_norm`, `mixer.q`, `mixer.scores` (the
        attention's shares), `mixer.mix`, `mixer`, `ffn.router.logits`, `ffn.router.choice`, `ffn`, ..."""
        prefix = f"blocks.{layer}."
        names = self._within(layer, prefix)
        with Recorder(self.model, names.values()) as seen, attention(self.model) as calls:
            self._logits(ids)
        found: dict[str, Tensor] = {}
        for ours, name in names.items():
            given = seen.outputs.get(name, ())
            if ours.endswith("router.map"):
                found |= routed(ours.removesuffix("map"), given)
            elif given:
                found[ours] = flat(given[0])
            if (call := calls.get(self.modules.get(prefix + ours, ""))) is not None:
                found |= {f"{ours}.{key}": value for key, value in call.items()}
        return {name: self._ours(prefix + name, value) for name, value in found.items()}

    def _within(self, layer: int, prefix: str) -> dict[str, str]:
        """Their modules inside a block: norms, routers, and each part, by its last linear where it has one (some
        families add the residual inside the part)."""
        found = {
            ours.removeprefix(prefix): theirs
            for ours, theirs in self.modules.items()
            if ours.startswith(prefix) and (ours.count(".") == 2 or ours.endswith(".router.map"))
        }
        for site, _, branch in self.spec.branches(layer):
            last = [f"{site.name}.{n}" for n, fan in branch.part.linears(site).items() if fan.out]
            if len(last) == 1 and last[0] in self.modules:
                found[site.name.removeprefix(prefix)] = self.modules[last[0]]
        return found

    def _ours(self, name: str, value: Tensor) -> Tensor:
        """Queries and keys in our layout of pairs."""
        rule, place = self.rules.get(f"{name}.weight", (None, None))
        if not isinstance(rule, Pairs) or place is None or value.dim() != 3:
            return value
        return rule.read([value.flatten(1).T], place)[0].T.view_as(value)


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


def open_live(folder: Path, family: ModuleType, spec: ModelSpec, config: Path | None = None) -> Live:
    """ValueError where transformers is absent, does not know the model, or finds tensors missing; and for an encoder,
    of which a reference file is the way."""
    if spec.encoder is not None or any("causal" in part.refusals() for _, part in spec.parts()):
        raise ValueError(f"{folder}: an encoder is compared with the outputs in a reference file (--reference)")
    model = load_live(folder, config or folder / CONFIG)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    there = frozenset(parameters)
    found, lost, rules = {}, set(), {}
    for copy in copies(family, spec):
        theirs = [spelled(name, family, there) for name in copy.theirs]
        if theirs == [None]:
            theirs = [nearby(copy.theirs[0], copy.rule.shapes(copy.place)[0], parameters)]
        for name in copy.place.names:
            rules[name] = (copy.rule, copy.place)
            if all(theirs):
                found[name] = str(theirs[0])
            else:
                lost.add(name)
    return Live(model, spec, modules(found, lost), rules)


def load_live(folder: Path, config: Path) -> nn.Module:
    try:
        import transformers
    except ModuleNotFoundError:
        raise ValueError(
            "transformers is not installed: pip install 'assay[hf]', or give the outputs in a reference file"
        ) from None
    closed = {"local_files_only": True, "trust_remote_code": False}
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        read = transformers.AutoConfig.from_pretrained(str(config), **closed)
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=read,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            output_loading_info=True,
            **closed,
        )
    except (ValueError, OSError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}: transformers {transformers.__version__} cannot load it: {reason:.300}") from None
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
    if told["missing_keys"]:
        raise ValueError(f"{folder}: transformers finds no {', '.join(sorted(told['missing_keys'])[:5])}")
    return model.eval()


def modules(found: Mapping[str, str], lost: set[str]) -> dict[str, str]:
    """Our modules -> theirs, from parameters' names: a module is where the names of its parameters part.

    lost: our parameters whose tensor has another name or form in memory (packed experts); they stand beside the rest.
    """
    inside: dict[str, list[str]] = {}
    for ours, theirs in found.items():
        while "." in ours:
            ours = ours.rpartition(".")[0]
            inside.setdefault(ours, []).append(theirs)
    partly = {name for one in lost for name in parents(one)}
    made = {ours: common([name.rpartition(".")[0] for name in names]) for ours, names in inside.items()}
    whole = {ours: theirs for ours, theirs in made.items() if theirs}
    for ours, theirs in whole.items():
        if ours in partly and len({name.rpartition(".")[0] for name in inside[ours]}) == 1:
            whole[ours] = theirs.rpartition(".")[0]
    return whole


def parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def common(names: Sequence[str]) -> str:
    """The dotted prefix that all share."""
    shared = []
    for parts in zip(*(name.split(".") for name in names)):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def nearby(name: str, shape: tuple[int, ...], parameters: Mapping[str, Tensor]) -> str | None:
    """A tensor that stands under another name in memory: the one of its layer with the same end and shape."""
    tail, numbers = name.split(".")[-2:], [p for p in name.split(".") if p.isdigit()]
    alike = [
        p
        for p, value in parameters.items()
        if p.split(".")[-2:] == tail and value.shape == shape and [x for x in p.split(".") if x.isdigit()] == numbers
    ]
    return alike[0] if len(alike) == 1 else None
