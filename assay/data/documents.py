"""Documents: texts with names that are read when asked for, and the files that they stand in."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


class Documents:
    """A list of texts that are read when asked for, each with a name."""

    def __init__(self, names: Sequence[str], read: Callable[[int], str]) -> None:
        self.names = tuple(names)
        self._read = read

    @classmethod
    def of(cls, texts: Sequence[str], names: Sequence[str] | None = None) -> Documents:
        """Documents in memory, named by their place unless names are given."""
        kept = tuple(texts)
        return cls([str(i) for i in range(len(kept))] if names is None else names, kept.__getitem__)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> str:
        return self._read(range(len(self))[i])

    def __iter__(self) -> Iterator[str]:
        return (self._read(i) for i in range(len(self)))

    def take(self, indices: Sequence[int]) -> Documents:
        return Documents([self.names[i] for i in indices], lambda i: self._read(indices[i]))

    @classmethod
    def joined(cls, lists: Sequence[Documents]) -> Documents:
        """Several lists as one; their names must differ."""
        places = [(side, i) for side in lists for i in range(len(side))]
        return cls([name for side in lists for name in side.names], lambda i: places[i][0][places[i][1]])

    @cached_property
    def digest(self) -> str:
        """sha256 over the names and the UTF-8 texts, in order."""
        total = hashlib.sha256()
        for name, text in zip(self.names, self, strict=True):
            total.update(hashlib.sha256(name.encode()).digest())
            total.update(hashlib.sha256(text.encode()).digest())
        return total.hexdigest()


@dataclass(frozen=True)
class Piece:
    """Bytes start .. stop of a file; `where` is how a message names it."""

    path: Path
    start: int
    stop: int | None
    where: str

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read() if self.stop is None else file.read(self.stop - self.start)

    def text(self, errors: str) -> str:
        """As UTF-8. ValueError, in strict mode, for what is not."""
        try:
            return self.read().decode("utf-8", errors)
        except UnicodeDecodeError as error:
            message = f"{self.where}: byte {self.start + error.start} is not UTF-8; errors: replace accepts such text"
            raise ValueError(message) from None


def plain(value: str, errors: str, where: str) -> str:
    """A text that UTF-8 can hold: JSON and others can spell half of a surrogate pair. ValueError in strict mode."""
    try:
        return value.encode("utf-8", errors).decode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds a lone surrogate; errors: replace accepts such text") from None


def files(source: str, *patterns: str) -> list[tuple[str, Path]]:
    """(name, path), sorted by name: relative to the folder, or to what stands before a glob's first wildcard."""
    given = Path(source).expanduser()
    if given.is_file():
        return [(given.name, given)]
    if given.is_dir():
        root, found = given, [path for pattern in patterns for path in given.rglob(pattern)]
    else:
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), given.parts))
        found = [Path(match) for match in glob.glob(str(given), recursive=True)]
    named = [(path.relative_to(root).as_posix(), path) for path in found if path.is_file()]
    kept = sorted({(name, path) for name, path in named if not any(part.startswith(".") for part in Path(name).parts)})
    if not kept:
        what = " or ".join(patterns)
        raise ValueError(f"corpus path {source!r}: no such file, folder with {what} files, or glob match")
    return kept


def default_cache() -> Path:
    """$ASSAY_CACHE, or assay/ in the user's cache folder ($XDG_CACHE_HOME, ~/.cache)."""
    chosen = os.environ.get("ASSAY_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "assay"
