"""Common Crawl's files as documents: plain text out of WET, pages without their tags out of WARC (ISO 28500)."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from assay.data.documents import Documents

LARGEST = 1 << 26
"""Bytes of one record when it is unpacked: a record of more is refused, however few they are in the file."""

TYPES = ("text/plain", "text/html", "application/xhtml+xml")
SILENT = frozenset({"script", "style", "noscript", "template", "head"})
BREAKS = frozenset(
    {"p", "div", "br", "li", "tr", "table", "ul", "ol", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "section"}
)


@dataclass(frozen=True)
class _Place:
    path: Path
    offset: int
    where: str


def records(named: Sequence[tuple[str, Path]], errors: str) -> Documents:
    """A document for each page of these (name, path) files, in their order: WET's conversions, and the responses of
    WARC that are text. ValueError for a file that is none, that is cut short, or whose record is too large."""
    found = [(f"{name}:{number}", place) for name, path in named for number, place in enumerate(_pages(path))]
    return Documents([name for name, _ in found], lambda i: _text(found[i][1], errors))


def _pages(path: Path) -> Iterator[_Place]:
    """Every record is read once, so that what is broken is known before training begins."""
    for walk, record in _walk(path, 0):
        size = sum(map(len, _blocks(record, str(path))))
        offset = walk.get_record_offset()  # known when the record has been read
        if size and _type(record) in TYPES and record.rec_type in ("conversion", "response"):
            yield _Place(path, offset, f"{path}, byte {offset}")


def _walk(path: Path, offset: int) -> Iterator[tuple[Any, Any]]:
    """warcio's iterator over the records from a byte of the file on, beside each of them."""
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    try:
        with path.open("rb") as file:
            file.seek(offset)
            walk = ArchiveIterator(file)
            for record in walk:
                yield walk, record
    except (ArchiveLoadFailed, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a whole WARC file ({' '.join(str(error).split())[:200]})") from None


def _blocks(record: Any, where: str) -> Iterator[bytes]:
    total, stream = 0, record.content_stream()
    while block := stream.read(1 << 16):
        total += len(block)
        if total > LARGEST:
            raise ValueError(f"{where}: a record of more than {LARGEST} bytes; smaller ones are accepted")
        yield block


def _type(record: Any) -> str:
    return _header(record).partition(";")[0].strip().lower()


def _header(record: Any) -> str:
    headers = record.http_headers if record.rec_type == "response" else record.rec_headers
    return str((headers.get_header("Content-Type") if headers is not None else None) or "")


def _text(place: _Place, errors: str) -> str:
    _, record = next(_walk(place.path, place.offset))
    data = b"".join(_blocks(record, place.where))
    charset = _header(record).lower().partition("charset=")[2].partition(";")[0].strip(" \"'")
    try:
        known = codecs.lookup(charset or "utf-8").name if charset.isascii() else "utf-8"
        text = data.decode(known, errors)
    except LookupError:
        text = data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        message = f"{place.where}: byte {error.start} of it is not {known}; errors: replace accepts such text"
        raise ValueError(message) from None
    return text if _type(record) == "text/plain" else visible(text)


class _Visible(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent += tag in SILENT
        self.parts += ["\n"] if tag in BREAKS else []

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in SILENT and self._silent > 0
        self.parts += ["\n"] if tag in BREAKS else []

    def handle_data(self, data: str) -> None:
        self.parts += [] if self._silent else [" ".join(data.split()) + " " if data.strip() else " "]


def visible(page: str) -> str:
    """The text of an HTML page: a line for each of its blocks. Nothing tells what is a menu and what is text."""
    parser = _Visible()
    parser.feed(page)
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    return "\n".join(line for line in lines if line) + "\n"
