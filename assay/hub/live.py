"""A checkpoint in transformers itself, as the reference that an import is compared with. Needs the extra `hf`.

float32, eager attention, files of the folder only, and no code from it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from assay.hub.family import copies
from assay.hub.load import CONFIG, matches, spelled
from assay.hub.recording import Recorder, attention, flat, routed
from assay.hub.rules import Pairs, Place, Rule
from assay.spec.model import ModelSpec

Told = Callable[[int, int], None]
ENCODER = "encoder."  # what the names of an encoder-decoder's encoder begin with
PADDED = 12  # columns of the padded batch
GREEDY = 8  # tokens of the greedy continuation
SAME = 1e-4  # of the largest logit: by more two of them differ


@dataclass(frozen=True)
class Live:
    """transformers' model, and which of its modules is which of ours. `rules`: how q and k are laid out."""

    model: nn.Module
    spec: ModelSpec
    modules: Mapping[str, str]
    rules: Mapping[str, tuple[Rule, Place]]

    @torch.no_grad()
    def reference(self, ids: Int[Tensor, "R T"], told: Told | None = None) -> dict[str, Tensor]:
        """What `assay.measure.parity` reads: the input, hidden states, logits, padded batches and a greedy reply.

        ids: of an encoder-decoder the source; the decoder gets its first token and the source's first half.
        """
        given = self._given(ids)
        found = {name: value for name, value in given.items() if name.endswith("input_ids")}
        stacks = {"": self._stack("", self.spec)}
        stacks |= {"enc.": self._stack(ENCODER, self.spec.encoder)} if self.spec.encoder is not None else {}
        names = [name for layers, final in stacks.values() for name in (*layers, *final)]
        with Recorder(self.model, names) as seen:
            logits = self._logits(given)
        found |= {"logits": logits} if self.spec.head is not None else {}
        for named, (layers, final) in stacks.items():
            for i, name in enumerate(layers):
                found[f"{named}hidden.{i}"], found[f"{named}hidden.{i + 1}"] = seen.inputs[name], seen.outputs[name][0]
            found |= {f"{named}final": seen.outputs[name][0] for name in final}
        for side in ("left", "right") if self.form == "decoder" else ("right",):
            padded = self._padded(found["input_ids"], side)
            if self._minds(padded):
                found |= {f"{side}pad.{name}": value for name, value in padded.items()}
        return found if self.form == "encoder" else found | self._greedy(found, told)

    @property
    def form(self) -> Literal["decoder", "encoder", "both"]:
        return form(self.spec)

    def _stack(self, prefix: str, spec: ModelSpec) -> tuple[list[str], list[str]]:
        """Their modules: the layers, if all are known, and the last one before the head."""
        names = [self.modules.get(f"{prefix}blocks.{i}") for i in range(spec.layers)]
        layers = [name for name in names if name is not None]
        layers = layers if len(layers) == spec.layers else []
        if spec.final_norm is None:
            return layers, layers[-1:]
        return layers, [name for name in [self.modules.get(f"{prefix}final_norm")] if name is not None]

    def _given(self, ids: Tensor) -> dict[str, Tensor]:
        """What the model is called with. An encoder may read its padding token as no token at all, so none is there."""
        if self.form == "decoder":
            return {"input_ids": ids}
        padding = getattr(self.model.config, "pad_token_id", None)
        if padding is not None:
            ids = ids.where(ids != padding, (padding + 1) % self.spec.vocab)
        if self.form == "encoder":
            return {"input_ids": ids}
        first = getattr(self.model.config, "decoder_start_token_id", None) or 0
        start = torch.full_like(ids[:, :1], first)
        return {"input_ids": ids, "decoder_input_ids": torch.cat([start, ids[:, : ids.shape[1] // 2]], 1)}

    def _logits(self, given: Mapping[str, Tensor]) -> Tensor:
        """[R, T, V]; of a classifier [R, labels], of a pooled head [R, D], and of a model without a head its features
        [R, T, D]."""
        out = self.model(**given, **({} if self.form == "encoder" else {"use_cache": False}))
        if task(self.spec) != "features":
            return out.logits
        return out.last_hidden_state if self.spec.head is None else out.pooler_output

    def _padded(self, ids: Tensor, side: str) -> dict[str, Tensor]:
        """Two rows of unequal length; padding is token 0."""
        width = min(PADDED, ids.shape[1])
        short, column = width - width // 3, torch.arange(width)
        keep = torch.stack([column >= width - short if side == "left" else column < short, column >= 0])
        rows = torch.zeros(2, width, dtype=ids.dtype)
        for row, mask in enumerate(keep):
            rows[row, mask] = ids[row % len(ids), : int(mask.sum())]
        mask = keep.long()
        given = {"input_ids": rows, "attention_mask": mask}
        if self.form == "both":
            given["decoder_input_ids"] = self._given(ids[:, :width])["decoder_input_ids"]
        elif self.form == "decoder" and "position_ids" in inspect.signature(self.model.forward).parameters:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return {k: v for k, v in given.items() if k != "position_ids"} | {"logits": self._logits(given)}

    def _minds(self, padded: Mapping[str, Tensor]) -> bool:
        """Whether transformers says of a padded row what it says of the row alone: some of its recurrences take padding
        for tokens, and some of its masks count columns. Such a row is no reference."""
        if self.form != "decoder":
            return True
        keep = padded["attention_mask"][0].bool()
        alone = self._logits({"input_ids": padded["input_ids"][:1, keep]})[0]
        return bool((padded["logits"][0, keep] - alone).abs().max() <= SAME * alone.abs().max())

    def _greedy(self, found: Mapping[str, Tensor], told: Told | None) -> dict[str, Tensor]:
        """The likeliest token, again and again, each from the whole text so far: no cache has a part in it."""
        logits: list[Tensor] = []
        source, said = {"input_ids": found["input_ids"]}, found["input_ids"]
        if self.form == "both":
            said = found["decoder_input_ids"][:, :1]
        for done in range(GREEDY):
            given = {"input_ids": said} if self.form == "decoder" else {**source, "decoder_input_ids": said}
            logits.append(self._logits(given)[:, -1])
            said = torch.cat([said, logits[-1].argmax(-1, keepdim=True)], 1)
            if told is not None:
                told(done + 1, GREEDY)
        return {"greedy_ids": said[:, -GREEDY:], "greedy_logits": torch.stack(logits, 1)}

    @torch.no_grad()
    def inside(self, layer: int, ids: Int[Tensor, "R T"], side: str = "") -> dict[str, Tensor]:
        """What happens inside a block, under our names within it, flat: `mixer_norm`, `mixer.q`, `mixer.scores` (the
        attention's shares), `mixer.mix`, `mixer`, `ffn.router.logits`, `ffn.router.choice`, `ffn`, ...

        side: `ENCODER` for a block of an encoder-decoder's encoder.
        """
        prefix = f"{side}blocks.{layer}."
        names = self._within(layer, side)
        with Recorder(self.model, names.values()) as seen, attention(self.model) as calls:
            self._logits(self._given(ids))
        found: dict[str, Tensor] = {}
        for ours, name in names.items():
            given = seen.outputs.get(name, ())
            if ours.endswith("router.map"):
                found |= routed(ours.removesuffix("map"), given)
            elif given:
                found[ours] = flat(given[0])
            within = [call for of, call in calls.items() if inside_of(of, self.modules.get(prefix + ours, "-"))]
            if len(within) == 1:
                found |= {f"{ours}.{key}": value for key, value in within[0].items()}
        return {name: self._ours(prefix + name, value) for name, value in found.items()}

    def _within(self, layer: int, side: str) -> dict[str, str]:
        """Their modules inside a block: norms, routers, and each part, by its last linear where it has one (some
        families add the residual inside the part)."""
        prefix = f"{side}blocks.{layer}."
        found = {
            ours.removeprefix(prefix): theirs
            for ours, theirs in self.modules.items()
            if ours.startswith(prefix) and ("." not in ours.removeprefix(prefix) or ours.endswith(".router.map"))
        }
        spec = self.spec.encoder if side == ENCODER and self.spec.encoder is not None else self.spec
        for site, _, branch in spec.branches(layer):
            last = [f"{side}{site.name}.{n}" for n, fan in branch.part.linears(site).items() if fan.out]
            if len(last) == 1 and last[0] in self.modules:
                found[f"{side}{site.name}".removeprefix(prefix)] = self.modules[last[0]]
        return found

    def _ours(self, name: str, value: Tensor) -> Tensor:
        """Queries and keys in our layout of pairs."""
        rule, place = self.rules.get(f"{name}.weight", (None, None))
        if not isinstance(rule, Pairs) or place is None or value.dim() != 3:
            return value
        return rule.read([value.flatten(1).T], place)[0].T.view_as(value)


def open_live(folder: Path, family: ModuleType, spec: ModelSpec, config: Path | None = None) -> Live:
    """ValueError where transformers is absent, does not know the model, or finds tensors missing."""
    unread = {**getattr(family, "SKIP", {}), **(family.skip(spec) if hasattr(family, "skip") else {})}
    model = load_live(folder, config or folder / CONFIG, AUTO[task(spec)], tuple(unread))
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
    return Live(model, spec, {ours: called(model, name) for ours, name in modules(found, lost).items()}, rules)


def form(spec: ModelSpec) -> Literal["decoder", "encoder", "both"]:
    if spec.encoder is not None:
        return "both"
    return "encoder" if any("causal" in part.refusals() for _, part in spec.parts()) else "decoder"


AUTO = {
    "both": "AutoModelForSeq2SeqLM",
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModelForMaskedLM",
    "label": "AutoModelForSequenceClassification",
    "features": "AutoModel",
}


def task(spec: ModelSpec) -> str:
    """Which of `AUTO` has this model's head."""
    if spec.head is None or spec.head.kind_name() == "pooled":
        return "features"
    return form(spec) if spec.head.names_tokens else "label"


def load_live(folder: Path, config: Path, auto: str, unread: tuple[str, ...] = ()) -> nn.Module:
    """auto: transformers' class. unread: patterns of tensors that may be missing, since nothing that is compared reads
    them."""
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
        model, told = getattr(transformers, auto).from_pretrained(
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
    missing = [key for key in sorted(told["missing_keys"]) if not any(matches(pattern, key) for pattern in unread)]
    if missing:
        raise ValueError(f"{folder}: transformers finds no {', '.join(missing[:5])}")
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
    inside = {ours: layered(names) for ours, names in inside.items()}
    partly = {name for one in lost for name in parents(one)}
    made = {ours: common([name.rpartition(".")[0] for name in names]) for ours, names in inside.items()}
    whole = {ours: theirs for ours, theirs in made.items() if theirs}
    for ours, theirs in whole.items():
        if ours in partly and len({name.rpartition(".")[0] for name in inside[ours]}) == 1:
            whole[ours] = theirs.rpartition(".")[0]
    return whole


def layered(names: list[str]) -> list[str]:
    """Those that stand in a numbered layer, where any does: Gemma 4 keeps what its first layer has for all outside."""
    return [name for name in names if any(part.isdigit() for part in name.split("."))] or names


def called(model: nn.Module, name: str) -> str:
    """The module itself, or what calls it: a list of modules is called by nobody."""
    while isinstance(model.get_submodule(name), nn.ModuleList | nn.ModuleDict):
        name = name.rpartition(".")[0]
    return name


def inside_of(name: str, other: str) -> bool:
    """Whether a dotted name is another one, or within it."""
    return name == other or name.startswith(f"{other}.")


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
