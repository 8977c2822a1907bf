"""What is asked of a server, and when: public traces read from their files. No torch.

Azure's traces (Patel et al. 2024, arXiv 2311.18677; github.com/Azure/AzurePublicDataset) are CSV with the columns
TIMESTAMP, ContextTokens, GeneratedTokens. Mooncake's (Qin et al. 2025, arXiv 2407.00079) are JSON lines with timestamp
[ms], input_length, output_length and hash_ids: a number for each block of 512 tokens of the prompt, the last one
perhaps not full. Equal numbers are equal blocks after equal beginnings.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

BLOCK = 512
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE = ("timestamp", "input_length", "output_length", "hash_ids")


@dataclass(frozen=True)
class Arrival:
    """at [s]; prompt and new, in tokens; blocks: what each BLOCK of the prompt holds, empty where that is not known."""

    at: float
    prompt: int
    new: int
    blocks: tuple[int, ...] = ()


Trace = Sequence[Arrival]


def read_trace(path: Path) -> list[Arrival]:
    """A .csv file in Azure's shape or a .jsonl file in Mooncake's, by time, the first arrival at 0."""
    readers = {".csv": _azure, ".jsonl": _mooncake}
    if path.suffix not in readers:
        raise ValueError(f"{path}: accepted: .csv ({', '.join(AZURE)}) or .jsonl ({', '.join(MOONCAKE)})")
    try:
        found = sorted(readers[path.suffix](path), key=lambda one: one.at)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; a trace is CSV or JSON lines") from None
    if not found:
        raise ValueError(f"{path}: no requests; a trace has at least one")
    return [replace(one, at=one.at - found[0].at) for one in found]


def _azure(path: Path) -> Iterator[Arrival]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        missing = [name for name in AZURE if name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: line 1: no column {missing[0]}; accepted: {', '.join(AZURE)}")
        for row in rows:
            where = f"{path}: line {rows.line_num}"
            yield Arrival(_moment(row[AZURE[0]], where), _count(row, AZURE[1], where), _count(row, AZURE[2], where))


def _moment(text: str | None, where: str) -> float:
    try:
        return datetime.fromisoformat(text or "").timestamp()
    except ValueError:
        accepted = "a date and a time, such as 2023-11-16 18:15:46.68"
        raise ValueError(f"{where}: TIMESTAMP: {text!r}; accepted: {accepted}") from None


def _count(row: dict[str, Any], name: str, where: str) -> int:
    try:
        value = int(row[name])
    except (TypeError, ValueError):
        value = 0
    if value < 1:
        raise ValueError(f"{where}: {name}: {row.get(name)!r}; accepted: a whole number above 0")
    return value


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line that is not empty, as `FILE: line N` and its object."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}: line {number}"
            if line.strip():
                yield where, _object(line, where)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: not JSON; accepted: one object a line") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: {type(found).__name__}; accepted: one object a line")
    return found


def number(row: dict[str, Any], name: str, where: str) -> float:
    """A finite number, zero or more."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e300:
        raise ValueError(f"{where}: {name}: {value!r}; accepted: a number of at least 0")
    return float(value)


def whole(row: dict[str, Any], name: str, where: str, least: int = 1) -> int:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{where}: {name}: {value!r}; accepted: a whole number of at least {least}")
    return value


def _mooncake(path: Path) -> Iterator[Arrival]:
    for where, row in json_lines(path):
        at, prompt = number(row, "timestamp", where) / 1000, whole(row, "input_length", where)
        ids = row.get("hash_ids")
        if not isinstance(ids, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
            raise ValueError(f"{where}: hash_ids: {str(ids)[:60]}; accepted: a list of whole numbers")
        if len(ids) > -(-prompt // BLOCK):
            most = f"at most one for each {BLOCK} tokens of input_length {prompt}, begun ones included"
            raise ValueError(f"{where}: hash_ids: {len(ids)} of them; accepted: {most}")
        yield Arrival(at, prompt, whole(row, "output_length", where), tuple(ids))


def at_rate(trace: Trace, rate: float) -> list[Arrival]:
    """The same requests in the same order, all gaps stretched by one factor so that `rate` arrive a second on average.

    Pauses between the turns of a conversation are stretched with the rest.
    """
    if not 0 < rate < float("inf"):
        raise ValueError(f"rate: {rate}; accepted: requests a second, above 0")
    factor = rate_of(trace) / rate
    if factor == float("inf"):
        raise ValueError("rate: all requests of the trace come at once; accepted: a trace that takes some time")
    return [replace(one, at=one.at * factor) for one in trace]


def rate_of(trace: Trace) -> float:
    """Requests a second, over the gaps between the first and the last; infinite where all come at once."""
    took = trace[-1].at - trace[0].at
    return (len(trace) - 1) / took if took > 0 else float("inf")
