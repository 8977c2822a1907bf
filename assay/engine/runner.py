"""A model at work on a cache: tokens of any sequences in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from assay.cache import Cache, Paged, PageSize, Size, Slot, Swapped
from assay.cache.coded import Quantised
from assay.cache.size import Fields
from assay.engine import steady
from assay.engine.config import Attention, position_limit
from assay.engine.storage import Storage
from assay.engine.tapes import Tapes
from assay.model.lm import LM, Output, state_table
from assay.ops.heap import keep_freed
from assay.ops.largepages import in_large_pages
from assay.ops.native import kernels
from assay.ops.step import Piece, Step, joined
from assay.spec.model import ModelSpec

CHUNK = 512  # tokens of a prompt that one step takes: bounds the scores' memory and a window's headroom

Ids = Sequence[int]


Finish = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True)
class Token:
    """One token of a reply. `text` is what has become certain with it; `finish` says that it is the last, and why.

    id: None where a reply ends without one more token. choice: the number of the reply among those of its request.
    logprob, top: as `Chosen` has them. reused: tokens of the prompt that were stored already. why: what went wrong, of
    a reply that ends with "error".
    """

    request: int
    id: int | None
    text: str
    finish: Finish | None
    choice: int = 0
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    reused: int = 0
    why: str = ""


def check_context(spec: ModelSpec, prompt: int, new: int) -> None:
    """ValueError when a prompt and what is to follow are longer than the positions reach."""
    limit = position_limit(spec)
    if limit is not None and prompt + new > limit:
        raise ValueError(
            f"a prompt of {prompt} tokens and {new} new ones are {prompt + new}; "
            f"the positions of this model reach {limit} tokens"
        )


def check_continues(spec: ModelSpec) -> None:
    """ValueError for a model that cannot continue a text: no head that names tokens, a part that sees later ones."""
    if spec.head is None or not spec.head.names_tokens:
        raise ValueError("this model does not continue text: generation needs a head with logits for every token")
    for site, part in spec.parts():
        reason = part.refusals().get("chunking")
        if reason is not None:
            raise ValueError(f"{site.name}: this model does not continue text: {reason}")


def check_source(spec: ModelSpec, source: Ids) -> None:
    """ValueError for a source text that is missing, or that nothing or no encoder of this size can read."""
    if spec.encoder is None:
        if source:
            raise ValueError("`source` is what an encoder reads, and this model has none: accepted: a prompt alone")
        return
    if not source:
        raise ValueError(
            "this model continues what its encoder has read: a request without `source` cannot be answered"
        )
    if not 0 <= min(source) <= max(source) < spec.encoder.vocab:
        raise ValueError(f"source token {max(source)}; the encoder has ids 0 to {spec.encoder.vocab - 1}")
    limit = position_limit(spec.encoder)
    if limit is not None and len(source) > limit:
        raise ValueError(f"a source of {len(source)} tokens; the positions of this model's encoder reach {limit}")


def right_padded(rows: Sequence[Ids], past: Sequence[int], horizon: Sequence[int], device: torch.device) -> Step:
    """A grid with a sequence a row, padded at its end; a row without tokens rests. `emit`: the last token of each
    row that has one; a grid of single tokens leaves it out, since it is all of them."""
    width, count = max(len(ids) for ids in rows), len(rows)
    lengths = torch.tensor([len(ids) for ids in rows], device=device)
    ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in rows], device=device)
    pasts = torch.tensor(past, device=device)
    column, row = torch.arange(width, device=device), torch.arange(count, device=device)
    full = all(len(ids) == width for ids in rows)
    seq = row[:, None].expand(count, width)
    seq = seq if full else torch.where(column < lengths[:, None], seq, -1)
    index = (pasts[:, None] + column).reshape(-1)
    last = row * width + (lengths - 1).clamp(min=0)
    return Step(
        {"ids": ids.view(-1)},
        seq.reshape(-1),
        index,
        index,
        torch.arange(count + 1, device=device) * width,
        pasts,
        torch.tensor(horizon, device=device),
        (count, width),
        count if full and width == 1 else 0,
        width,
        saves=last,
        emit=None if full and width == 1 else last if full else last[lengths > 0],
    )


@dataclass(frozen=True)
class Work:
    """Tokens that a sequence gets in a step, and whether the logits after the last of them are wanted."""

    slot: Slot
    ids: Ids
    emit: bool = True


def made(fields: Fields, size: Size | PageSize, weight: Tensor, storage: Storage) -> Cache | Paged:
    """A cache of this size, in the dtype and on the device of the model's weights. ValueError for rows with formats."""
    dtype, device = weight.dtype, weight.device
    if isinstance(size, Size):
        if storage != Storage():
            raise ValueError("page: null: rows are kept in the model's dtype and in memory; accepted: pages")
        return Cache(fields, size, dtype, device)
    if storage.formats is None:
        return Paged(fields, size, dtype, device, storage.backing)
    return Quantised(fields, size, dtype, device, storage.formats, storage.backing)


class Runner:
    """A model, its cache, and the horizon of each open sequence. Puts the model into evaluation mode."""

    def __init__(
        self,
        model: LM,
        size: Size | PageSize,
        storage: Storage | None = None,
        attention: Attention | None = None,
    ) -> None:
        check_continues(model.spec)
        self.attention = attention or Attention()
        weight = next(model.parameters())
        self.model, self.device = model.eval(), weight.device
        if self.device.type == "cpu":
            kernels()  # compiled now, where there are none yet, and not in the first request
            keep_freed()
        self.width = steady.width(model)
        self.cache = made(state_table(model.spec, model.prefix), size, weight, storage or Storage())
        in_large_pages([*model.parameters(), *(pool for _, pool in self.cache.tensors())])
        self.tapes = Tapes(self.model)
        if self.width is not None and isinstance(self.cache, Quantised) and self.cache.forms:
            raise ValueError(
                "kv dtype: what is read of keys and values in fewer bits depends on how tokens were cut into steps; "
                "accepted with deterministic algorithms: bf16"
            )
        self.horizons: dict[Slot, int] = {}
        self.sources: dict[Slot, Ids] = {}  # of sequences whose source nobody has encoded yet

    def open(self, horizon: int, source: Ids = (), tokens: Ids = (), key: bytes = b"") -> Slot:
        """A slot for a sequence of up to `horizon` tokens; position schemes that depend on length plan for that.

        source: what an encoder-decoder's encoder reads, once, with the first step of the sequence. tokens: what is to
        be fed; its beginning is taken from what sequences with the same `key` have stored, as far as there is any.
        """
        check_source(self.model.spec, source)
        if len(source) > self.cache.size.memory:
            raise ValueError(f"a source of {len(source)} tokens; this runner has room for {self.cache.size.memory}")
        slot = self.cache.open(tokens, key)
        self.horizons[slot] = horizon
        if source:
            self.sources[slot] = source
        return slot

    def close(self, slot: Slot) -> None:
        self.cache.close(slot)
        del self.horizons[slot]
        self.sources.pop(slot, None)

    def fork(self, slot: Slot) -> Slot:
        """A sequence that goes on from what this one has stored: pages are shared until one of the two writes."""
        made = self.cache.fork(slot)
        self.horizons[made] = self.horizons[slot]
        return made

    def swap_out(self, slot: Slot) -> Swapped:
        """Move what a sequence has stored to the host, and give its slot back."""
        moved = self.cache.swap_out(slot)
        del self.horizons[slot]
        return moved

    def swap_in(self, moved: Swapped, horizon: int) -> Slot | None:
        """The reverse; None where there is no room."""
        if not self.cache.holds(moved):
            return None
        slot = self.cache.swap_in(moved)
        self.horizons[slot] = horizon
        return slot

    @torch.inference_mode()
    def feed(self, slots: Sequence[Slot], rows: Sequence[Ids]) -> Float[Tensor, "E V"]:
        """Append `rows[i]` to `slots[i]`, in chunks; logits after the last token of each row that has tokens."""
        chunk = self.cache.size.chunk
        if all(0 < len(ids) <= chunk for ids in rows):
            return self.step([Work(slot, ids) for slot, ids in zip(slots, rows, strict=True)])
        left = {i: ids for i, ids in enumerate(rows) if ids}
        found: dict[int, Tensor] = {}
        while left:
            work = [Work(slots[i], ids[:chunk], len(ids) <= chunk) for i, ids in left.items()]
            logits = self.step(work)
            done = [i for i, ids in left.items() if len(ids) <= chunk]
            found |= dict(zip(done, logits.unbind() if done else (), strict=True))
            left = {i: ids[chunk:] for i, ids in left.items() if len(ids) > chunk}
        return torch.stack([found[i] for i in sorted(found)])

    @torch.inference_mode()
    def step(self, work: Sequence[Work], kept: bool = True) -> Float[Tensor, "E V"]:
        """One step for any mix of prompts' chunks and single tokens; logits after the last token of each work that
        asks for them, in the order of `work`: float32, or float64 of a model in float64. Not kept: who asks is done
        with them before the next step, and takes them in the model's own precision. Deterministic in half precision:
        as many calls as that takes."""
        if self.width is None:
            return self._call(work, kept)
        return torch.cat([self._call(call, True) for call in steady.calls(work, self.width)])

    def _call(self, work: Sequence[Work], kept: bool) -> Float[Tensor, "E V"]:
        logits = self.output(work).logits
        assert logits is not None
        if kept:  # a tape writes over its own
            logits = logits.clone() if logits.dtype in (torch.float32, torch.float64) else logits.float()
        order = sorted(range(len(work)), key=lambda i: len(work[i].ids))  # as `output` has them
        told = [i for i in order if work[i].emit]
        return logits if told == sorted(told) else logits[sorted(range(len(told)), key=told.__getitem__)]

    def output(self, work: Sequence[Work], listen: frozenset[str] = frozenset()) -> Output:
        """What the model says of such a step; the next may write over it. Works of one length are a piece of it, and
        short ones come first, in the order of `work`. Sequences that get one token each, as in the last step, go on
        from where that one ended."""
        if not listen and all(len(one.ids) == 1 and one.emit for one in work):
            again = self.tapes.again([one.slot for one in work], [one.ids[0] for one in work], self.horizons)
            if again is not None:
                return again
        groups: dict[int, list[Work]] = {}
        for one in work:
            groups.setdefault(len(one.ids), []).append(one)
        pieces, first = [], 0
        for length in sorted(groups):
            step = self.grid(groups[length]).with_(listen=listen)
            pieces.append(Piece(first, step, self.cache.begin([w.slot for w in groups[length]], step)))
            first += step.tokens
        if len(pieces) == 1:
            out = self.tapes.run(pieces[0].step, pieces[0].states)
            if all(one.emit for one in work):
                self.tapes.follow(self.cache, [one.slot for one in work])
        else:
            out = self.model(joined(pieces).with_(listen=listen))
        for one in work:
            self.sources.pop(one.slot, None)
        return out

    def grid(self, group: Sequence[Work]) -> Step:
        """Works of one length as the rows of a grid. One token goes the way of replies, more that of prompts."""
        past = [self.cache.length(w.slot) for w in group]
        step = right_padded([w.ids for w in group], past, [self.horizons[w.slot] for w in group], self.device)
        if not all(w.emit for w in group):
            assert step.saves is not None
            step = step.with_(emit=step.saves[[i for i, w in enumerate(group) if w.emit]])
        backend = self.attention.decode if step.longest == 1 else self.attention.prefill
        return step.with_(encode=self._unread([w.slot for w in group]), attention=backend)

    def _unread(self, slots: Sequence[Slot]) -> Step | None:
        """The sources that the encoder has yet to read; None where it has read them all."""
        rows = [self.sources.get(slot, ()) for slot in slots]
        if not any(rows):
            return None
        return right_padded(rows, [0] * len(rows), [len(ids) for ids in rows], self.device).with_(emit=None)
