"""Result: the one record a study writes and a report reads (docs/decisions/002-results.md). No torch here."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, model_validator

Kind = Literal["environment", "study", "trial", "measure", "failure", "sweep", "verdict", "claim", "synthesis"]
VERDICTS = ("better", "worse", "not distinguishable", "not tested")
OUTCOMES = ("confirmed", "contradicted", "not distinguishable", "not tested")
FLOAT_KEY = "$float"
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Result(BaseModel):
    """One line of results.jsonl. `values` carry their units in their names; nested lists and objects are plain JSON.

    >>> Result(kind="trial", study="positions", arm="rope", seed=0, values={"loss_nats": 1.97}).values["loss_nats"]
    1.97
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Kind
    study: str
    arm: str | None = None
    seed: int | None = None
    spec_digest: str | None = None
    recipe_digest: str | None = None
    commit: str | None = None
    version: str = ""
    device: str = "cpu"
    threads: int = 1
    values: dict[str, JsonValue]

    @model_validator(mode="after")
    def _words_and_rows(self) -> Result:
        """The closed vocabularies and the shape of a measurement; everything else in `values` is free."""
        if self.kind == "verdict":
            _one_of("verdict", self.values.get("verdict"), VERDICTS)
        elif self.kind == "claim":
            _one_of("outcome", self.values.get("outcome"), OUTCOMES)
        elif self.kind == "measure":
            rows = self.values.get("rows")
            if not isinstance(self.values.get("what"), str):
                raise ValueError("values.what of a measure must be a string, such as 'latency'")
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise ValueError("values.rows of a measure must be a list of objects")
        return self


def _one_of(field: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"values.{field} is {value!r}; accepted: {', '.join(accepted)}")


def dumps(result: Result) -> str:
    """One line of strict JSON (ASCII). NaN and the infinities become {"$float": "nan" | "inf" | "-inf"}."""
    return json.dumps(_pack(result.model_dump()), allow_nan=False, separators=(",", ":"))


def loads(line: str | bytes) -> Result:
    """The inverse of `dumps`; ValueError when the line is not strict JSON or not a Result."""
    return Result.model_validate(_unpack(json.loads(line, parse_constant=_refuse_constant)))


def _pack(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {FLOAT_KEY: "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
    if isinstance(value, dict):
        if FLOAT_KEY in value:
            raise ValueError(f"the key {FLOAT_KEY!r} is reserved for numbers that JSON lacks; rename it in {value!r}")
        return {key: _pack(item) for key, item in value.items()}
    return [_pack(item) for item in value] if isinstance(value, list) else value


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        if FLOAT_KEY in value:
            if len(value) > 1 or value[FLOAT_KEY] not in _SPECIAL:
                raise ValueError(f"{value!r} is no number; accepted: {{'{FLOAT_KEY}': one of {', '.join(_SPECIAL)}}}")
            return _SPECIAL[value[FLOAT_KEY]]
        return {key: _unpack(item) for key, item in value.items()}
    return [_unpack(item) for item in value] if isinstance(value, list) else value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def write_results(path: str | Path, results: Iterable[Result]) -> None:
    """Append the results, one line each, and fsync. One writer at a time.

    All of them are serialised before the file is touched. A last line torn by a kill is cut off first.
    """
    data = "".join(dumps(result) + "\n" for result in results).encode("ascii")
    if not data:
        return
    path = Path(path)
    is_new = not path.exists()
    with open(path, "ab+") as file:
        _mend_tail(file)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        _sync_folder(path.parent)


def _mend_tail(file: BinaryIO) -> None:
    """Leave the file empty or ending in a newline: a whole last line gets its newline, a torn one is removed."""
    if not file.seek(0, os.SEEK_END):
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    content = file.read()
    start = content.rfind(b"\n") + 1
    if _is_whole(content[start:]):
        file.write(b"\n")
    else:
        file.truncate(start)


def _is_whole(line: bytes) -> bool:
    try:
        loads(line)
    except ValueError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Make a new file's name survive a power cut; a platform that cannot open folders keeps its own guarantees."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_results(path: str | Path) -> list[Result]:
    """All Results of a file in the order written. A last line without a newline that does not parse is a torn write
    and is left out; any other bad line is a ValueError with the file and the line."""
    path = Path(path)
    lines = path.read_bytes().split(b"\n")
    if lines[-1] and not _is_whole(lines[-1]):
        lines.pop()
    return [_read_line(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _read_line(path: Path, number: int, line: bytes) -> Result:
    try:
        return loads(line)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'result'}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{path}:{number}: not a Result: {problems}") from None
    except ValueError as error:
        raise ValueError(f"{path}:{number}: not a line of strict JSON: {error}") from None
