"""Names for the beginnings of texts. The name of a page says everything that its contents depend on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256
from struct import pack


def root(key: bytes) -> bytes:
    """The parent of a first page. `key` carries what else the contents depend on, or who may share them: the digest of
    the model, the adapter, the tenant's own key."""
    return sha256(b"root" + key).digest()


def name(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a page with these tokens behind a page of name `parent`: sha256 over both."""
    return sha256(b"page" + parent + pack(f"<{len(tokens)}q", *tokens)).digest()


def names(parent: bytes, tokens: Sequence[int], page: int, start: int = 0) -> Iterator[bytes]:
    """Names of the whole pages of a text from token `start` on; `parent` names the page that ends there."""
    for at in range(start, len(tokens) - page + 1, page):
        parent = name(parent, tokens[at : at + page])
        yield parent
