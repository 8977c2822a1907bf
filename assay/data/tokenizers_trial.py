"""A tokenizer is tried before anything is made of it: what its parts say of each other is looked at late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from assay.data.tokenizers import Tokenizer

MAX_IDS = 1 << 22
TRIAL = "a Z1\n\u00e9\U0001f600"
"""Words, a number, spaces, and what hardly any vocabulary has."""


@contextmanager
def held(where: str) -> Iterator[None]:
    """What the library makes of a file that is none: exceptions of any type, and panics, which are no `Exception`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, ValueError):
        raise
    except BaseException as error:
        raise ValueError(f"{where}: not a tokenizer that encodes texts: {error}") from None


def usable(words: Tokenizer, where: str) -> Tokenizer:
    """The tokenizer, if a text can be encoded and decoded. ValueError says what does not fit."""
    most = max(words.hf.get_vocab().values(), default=-1)
    if not 0 <= most < MAX_IDS:
        raise ValueError(f"{where}: the last token is {most}; 0 to {MAX_IDS - 1} are accepted")
    with held(where):
        ids = words.framed(words.known(TRIAL))
        words.decode(ids)
    if len(ids) and ids.max() > most:
        raise ValueError(f"{where}: token {ids.max()} stands around a text, and the last is {most}")
    return words
