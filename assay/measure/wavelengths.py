"""Wavelengths of rotary position embeddings, and which of them a training length completes."""

from __future__ import annotations

from typing import Any

from assay.measure.subject import Subject
from assay.parts.positions.rope import Rope, wavelengths

SECONDS = 0.0


def measure(subject: Subject, *, length: int | None = None) -> list[dict[str, Any]]:
    """Rows: scheme, dim (the pair's number), wavelength (tokens of a full turn), completes (within `length`, which is
    the training length unless given). No rows for a model without rotary positions."""
    seen = subject.length if length is None else length
    rows, found = [], set()
    for site, part in subject.spec.parts():
        name = getattr(part, "position", None)
        scheme = subject.spec.positions.get(name) if isinstance(name, str) else None
        if not isinstance(scheme, Rope) or name in found:
            continue
        found.add(name)
        for pair, tokens in enumerate(wavelengths(scheme, part.size(site), seen)):  # type: ignore[attr-defined]
            rows.append({"scheme": name, "dim": pair, "wavelength": tokens, "completes": tokens <= seen})
    return rows
