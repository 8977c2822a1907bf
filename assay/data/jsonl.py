"""Lines of JSON as documents: one object a line, the text in one of its fields."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from assay.data.documents import Documents, Piece, plain


def json_lines(named: Sequence[tuple[str, Path]], field: str, errors: str) -> Documents:
    """A document for each line of these (name, path) files. ValueError, on reading, names the line that is none."""
    found: list[tuple[str, Piece]] = []
    for name, path in named:
        start = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found.append((f"{name}:{number}", Piece(path, start, start + len(line), f"{path}, line {number}")))
                start += len(line)
    return Documents([name for name, _ in found], lambda i: _text(found[i][1], field, errors))


def _text(piece: Piece, field: str, errors: str) -> str:
    try:
        row = json.loads(piece.text(errors))
    except json.JSONDecodeError as error:
        raise ValueError(f"{piece.where}: not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{piece.where}: not JSON that can be read: it is nested too deeply") from None
    if not isinstance(row, dict) or field not in row:
        has = ", ".join(map(repr, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise ValueError(f"{piece.where}: no field {field!r}; the line has {has or 'no fields'}")
    if not isinstance(row[field], str):
        raise ValueError(f"{piece.where}: field {field!r} is a {type(row[field]).__name__}, not a string")
    return plain(row[field], errors, f"{piece.where}: field {field!r}")
