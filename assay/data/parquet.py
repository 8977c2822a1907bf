"""Rows of Parquet files as documents, read a row group at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from assay.data.documents import Documents, plain

LARGEST = 1 << 30
"""Bytes of one column in one row group, as its file says that they will be: more is refused before it is read."""


def rows(named: Sequence[tuple[str, Path]], field: str, errors: str) -> Documents:
    """A document for each row of these (name, path) files; the text is the row's `field`. ValueError for what is no
    Parquet file, has no such field, or is no text."""
    names: list[str] = []
    tables, starts = [], [0]
    for name, path in named:
        table = _Table(path, field, errors)
        tables.append(table)
        names += [f"{name}:{i}" for i in range(table.rows)]
        starts.append(len(names))

    def read(i: int) -> str:
        number = bisect_right(starts, i) - 1
        return tables[number].text(i - starts[number])

    return Documents(names, read)


class _Table:
    """One file; the row group that was read last is kept."""

    def __init__(self, path: Path, field: str, errors: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.field, self.errors = path, field, errors
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
        schema = self._file.schema_arrow
        if field not in schema.names:
            raise ValueError(f"{path}: no field {field!r}; its rows have {', '.join(map(repr, schema.names))}")
        kind = schema.field(field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"{path}: field {field!r} is of type {kind}, not string")
        about = self._file.metadata
        self._starts = [0]
        for group in range(about.num_row_groups):
            self._check(group, about)
            self._starts.append(self._starts[-1] + about.row_group(group).num_rows)
        self._held: tuple[int, list[str | None]] = (-1, [])

    def _check(self, group: int, about: object) -> None:
        columns = about.row_group(group)  # type: ignore[attr-defined]
        for i in range(columns.num_columns):
            column = columns.column(i)
            if column.path_in_schema == self.field and column.total_uncompressed_size > LARGEST:
                size = column.total_uncompressed_size
                raise ValueError(
                    f"{self.path}, row group {group}: {size} bytes of text; at most {LARGEST} are read at once"
                )

    @property
    def rows(self) -> int:
        return self._starts[-1]

    def text(self, row: int) -> str:
        import pyarrow as pa

        group = bisect_right(self._starts, row) - 1
        if group != self._held[0]:
            try:
                found = self._file.read_row_group(group, [self.field]).column(0).to_pylist()
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                why = str(error).splitlines()[0]
                raise ValueError(f"{self.path}, row group {group}: cannot be read ({why})") from None
            self._held = (group, found)
        value = self._held[1][row - self._starts[group]]
        if value is None:
            raise ValueError(f"{self.path}, row {row}: field {self.field!r} is null, not a string")
        return plain(value, self.errors, f"{self.path}, row {row}: field {self.field!r}")
