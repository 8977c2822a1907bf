"""Names for the beginnings of texts. The name of a page says everything that its contents depend on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
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


@dataclass
class Text:
    """The tokens of an open sequence, and the names of its settled pages. Not `plain`: what is stored depends on more
    than the tokens and the key, so that its pages get no names."""

    root: bytes
    tokens: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    plain: bool = True

    def copy(self) -> Text:
        return replace(self, tokens=list(self.tokens), names=list(self.names))

    def cut(self, length: int, page: int) -> None:
        del self.tokens[length:], self.names[length // page :]

    def settle(self, page: int) -> list[tuple[int, bytes]]:
        """Names for the pages that have become full: their numbers and names."""
        done = len(self.names)
        self.names += names(self.names[-1] if done else self.root, self.tokens, page, done * page)
        return [(number, self.names[number]) for number in range(done, len(self.names))]
