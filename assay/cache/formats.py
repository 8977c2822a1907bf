"""How token fields are stored: which fields in how many bits, and the bytes of that. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from assay.cache.size import Bytes, Fields, PageSize, entry_bytes
from assay.spec.base import StateField

Axis = Literal["channel", "token"]

SCALE_BYTES = 2  # of a scale, and of a zero
PLAIN = {"bf16": "bfloat16", "f16": "float16"}
ACCEPTED = "bf16, f16, or int8, int4 or int2, then /channel or /token, then nothing or :GROUP, as in int4/channel:32"
_NAME = re.compile(r"int(8|4|2)/(channel|token)(?::([1-9][0-9]*))?")


@dataclass(frozen=True)
class Format:
    """How a page is quantised. group: values that share a scale, along the tokens of a page (`channel`) or along the
    channels of a token (`token`); None: all of them. It must divide what it runs along."""

    bits: int
    axis: Axis
    group: int | None = None

    @classmethod
    def parse(cls, text: str) -> Format:
        """`int4/channel:32`. ValueError for anything else."""
        found = _NAME.fullmatch(text)
        if found is None:
            raise ValueError(f"kv format: {text!r}; accepted: {ACCEPTED}")
        axis: Axis = "channel" if found[2] == "channel" else "token"
        return cls(int(found[1]), axis, int(found[3]) if found[3] else None)

    def __str__(self) -> str:
        return f"int{self.bits}/{self.axis}" + (f":{self.group}" if self.group else "")

    def run(self, shape: tuple[int, ...]) -> int:
        """Values in a group of a page [T, ..., D]. ValueError where groups do not divide the page."""
        along, what = (shape[0], "tokens of a page") if self.axis == "channel" else (shape[-1], "channels")
        group = self.group or along
        if along % group:
            raise ValueError(f"kv format: {self}: groups of {group} do not divide the {along} {what}")
        return group

    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], math.ceil(shape[-1] * self.bits / 8))

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the scales, and of the zeros, of a page [T, ..., D]."""
        group = self.run(shape)
        if self.axis == "channel":
            return (shape[0] // group, *shape[1:])
        return (*shape[:-1], shape[-1] // group)

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Of a page [T, ..., D]: codes, scales and zeros."""
        return math.prod(self.codes_shape(shape)) + 2 * SCALE_BYTES * math.prod(self.scales_shape(shape))


Stored = Format | str  # a str: the dtype of fields that are rounded and not quantised


@dataclass(frozen=True)
class Formats:
    """Globs of `part.field` to formats; of several that match, the last counts. residual: the newest tokens of a
    sequence, which are kept in the model's dtype."""

    rules: Mapping[str, str] = field(default_factory=dict)
    residual: int = 32

    def __post_init__(self) -> None:
        if self.residual < 0:
            raise ValueError(f"residual: {self.residual}; accepted: 0 or more tokens")

    def resolve(self, fields: Fields, size: PageSize) -> dict[tuple[str, str], Stored]:
        """The format of each field that has one. ValueError for a field that cannot have it, and for a glob that no
        field matches."""
        found: dict[tuple[str, str], Stored] = {}
        for glob, text in self.rules.items():
            form = PLAIN.get(text) or Format.parse(text)
            matching = [(part, f) for part, own in fields.items() for f in own if fnmatchcase(f"{part}.{f.name}", glob)]
            if not matching:
                names = sorted({f.name for own in fields.values() for f in own})
                raise ValueError(f"formats: {glob!r} matches no field; the fields are named {', '.join(names)}")
            for part, f in matching:
                reason = self._refusal(f, form, size)
                if reason:
                    raise ValueError(f"formats: {part}.{f.name} cannot be stored as {text}: {reason}")
                found[part, f.name] = form
        return found

    def _refusal(self, f: StateField, form: Stored, size: PageSize) -> str:
        if f.per == "sequence":
            return "it is one state a sequence, rewritten by every token, and errors would add up"
        if f.per == "memory":
            return "it is a memory, which is kept whole; accepted: fields with an entry for each token"
        if f.dtype != "model":
            return f"it is declared as {f.dtype}"
        if isinstance(form, str):
            return ""
        if len(f.shape) < 2 and form.axis == "token" and form.group is None:
            return "one scale for a whole latent is not for each head; accepted: /channel, or /token:GROUP"
        if not f.shape:
            return "it is one number a token"
        if f.keep is not None and f.keep <= self.residual:
            return f"its window of {f.keep} tokens is within the residual of {self.residual}, so nothing would change"
        form.run((size.page, *f.shape))
        return ""

    def whole(self, keep: int | None, size: PageSize) -> int:
        """Pages of a group that may be in the model's dtype at once: of each sequence the residual, the rest of the
        page in which it begins, and the tokens in flight."""
        return min(size.pages_of(keep), size.rows * -(-(self.residual + size.page - 1 + size.chunk) // size.page))


def predict_quantised(fields: Fields, size: PageSize, dtype: str, formats: Formats) -> Bytes:
    """The bytes of `Quantised` before it exists. Quantised fields: stored are the codes, scales and zeros of all pages,
    headroom the pages of the residual."""
    forms, stored, reserved = formats.resolve(fields, size), 0, 0
    for part, own in fields.items():
        for f in own:
            form = forms.get((part, f.name))
            if isinstance(form, Format):
                held = size.pages_of(f.keep) * form.bytes((size.page, *f.shape))
                stored += held
                reserved += held + formats.whole(f.keep, size) * size.page * entry_bytes(f, dtype)
            else:
                one = entry_bytes(f, dtype if form is None else form)
                stored += size.stored(f) * one
                reserved += math.prod(size.shape(f)) * one
    return Bytes(stored, reserved - stored)
