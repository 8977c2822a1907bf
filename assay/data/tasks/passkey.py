"""Passkey retrieval: a key is stated once, filler follows, and the end of the document asks for it.

Mohtashami and Jaggi 2023, arXiv 2305.16300, section 4.2, cut down to bytes so that documents of 64 tokens exist:

    filler ... <statement><key><end> filler ... <statement><key>

The question repeats the statement, so that copying what followed it last time is enough (an induction head). As in the
paper the key's symbols stand nowhere else: who looks for them need not read the statement, and gets round everything
but the distance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from assay.data.draws import Draws
from assay.data.tasks.base import Ids, Shortcut
from assay.spec.base import Spec

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


@dataclass(frozen=True)
class Example:
    """One question: prompt and answer are ids (bytes); distance is how far back the key's first symbol stands."""

    prompt: NDArray[np.int64]
    answer: NDArray[np.int64]
    distance: int


class Passkey(Spec):
    """What a passkey document is made of.

    `digits` symbols of `alphabet` are the key. The alphabet's symbols, and the statement, stand nowhere else.
    For training, up to `asks` questions stand in a document, at drawn places: that number, halved as often as a draw
    says, or as many as fit. `answer_only` means that nothing else is to be predicted. A document that is scored has
    one question, at its end. The defaults are the sentence of the
    paper; `Passkey.short()` is what a tiny model learns in seconds.
    """

    digits: int = Field(5, ge=1)
    alphabet: str = Field("0123456789", min_length=2)
    statement: str = Field("The passkey is ", min_length=1)
    end: str = ". "
    filler: str = Field(FILLER, min_length=1)
    asks: int = Field(1, ge=1)
    answer_only: bool = False

    @model_validator(mode="after")
    def _tells_apart(self) -> Self:
        for name in ("alphabet", "statement", "end", "filler"):
            if not getattr(self, name).isascii():
                raise ValueError(f"{name}: {getattr(self, name)!r}; accepted: ASCII, for a symbol is a byte")
        if len(set(self.alphabet)) != len(self.alphabet):
            raise ValueError(f"alphabet: {self.alphabet!r} repeats a symbol")
        if set(self.alphabet) & set(self.statement + self.end + self.filler):
            raise ValueError(f"alphabet: a symbol of {self.alphabet!r} stands in the statement, end or filler too")
        if any(self.statement in text for text in self._elsewhere()):
            raise ValueError(f"statement: {self.statement!r} stands in the filler too, or where filler meets it")
        return self

    def _elsewhere(self) -> Iterator[str]:
        """Whatever a document can hold beside its two statements, each followed by all of the statement but its end."""
        ring = self.filler * (2 + len(self.statement) // len(self.filler))
        most = self.statement[:-1]
        yield self.end + most
        for i in range(len(self.filler)):
            yield ring[: len(ring) - i] + most
            yield self.end + ring[i:]

    @classmethod
    def short(cls) -> Passkey:
        """One digit between marks: the same question in few tokens."""
        return cls(digits=1, statement="#", end=";", asks=8, answer_only=True)

    @property
    def chance(self) -> float:
        """The accuracy of guessing: the whole key must be right."""
        return float(len(self.alphabet)) ** -self.digits

    def distances(self, length: int) -> range:
        """The distances that a document of `length` tokens can have. ValueError where there is none."""
        fixed = self.digits + len(self.statement)
        possible = range(fixed + len(self.end), length - fixed + 1)
        if not possible:
            shortest = fixed + len(self.end) + fixed
            raise ValueError(f"length: {length}; a passkey document needs {shortest} tokens or more")
        return possible

    def example(self, length: int, key: int, distance: int | None = None) -> Example:
        """A question of exactly `length` tokens, answer included; the distance is drawn evenly unless it is given."""
        possible = self.distances(length)
        draws = Draws("passkey", key)
        if distance is None:
            distance = possible[draws.below(len(possible))]
        if distance not in possible:
            raise ValueError(f"distance: {distance}; accepted at length {length}: {possible[0]} to {possible[-1]}")
        symbols = "".join(self.alphabet[draws.below(len(self.alphabet))] for _ in range(self.digits))
        told = self.statement + symbols + self.end
        before = length - self.digits - distance - len(self.statement)
        between = distance - self.digits - len(self.end) - len(self.statement)
        text = self._fill(draws, before) + told + self._fill(draws, between) + self.statement
        return Example(_ids(text), _ids(symbols), distance)

    def _fill(self, draws: Draws, size: int) -> str:
        """`size` characters of the filler, over and over, from somewhere in it."""
        start = draws.below(len(self.filler))
        return (self.filler * (size // len(self.filler) + 2))[start : start + size]

    def draw(self, length: int, key: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """A document for training (`assay.data.loader.Source`)."""
        example = self.example(length, key)
        tokens = np.concatenate([example.prompt, example.answer])
        counted = np.full(length, not self.answer_only)
        counted[-self.digits :] = True
        told = np.concatenate([_ids(self.statement), example.answer, _ids(self.end)])
        for start in self._more(length, example.distance, len(told), key):
            tokens[start : start + len(told)] = told
            answer = start + len(self.statement)
            counted[answer : answer + self.digits] = True
        return tokens, counted

    def _more(self, length: int, distance: int, size: int, key: int) -> Iterator[int]:
        """Where further questions of `size` tokens start: in the filler between the statement and the last question.

        Many questions are quickly learned, for a key stands wherever one looks; few show that it can be far away.
        """
        draws = Draws("passkey questions", key)
        asks = self.asks >> draws.below(self.asks.bit_length())
        first = length - distance + len(self.end)
        room = length - self.digits - len(self.statement) - first
        count = min(asks - 1, room // size)
        free = room - count * size  # tokens of filler that stay, cut at `count` even draws
        return (first + cut + i * size for i, cut in enumerate(sorted(draws.below(free + 1) for _ in range(count))))

    def solve(self, prompt: NDArray[np.int64]) -> NDArray[np.int64]:
        """The oracle: what follows the first statement in the prompt."""
        text = bytes(prompt.tolist()).decode("ascii")
        start = text.index(self.statement) + len(self.statement)
        return _ids(text[start : start + self.digits])

    def shortcuts(self, length: int) -> dict[str, Shortcut]:
        """Ways to answer that must not solve documents of `length` tokens: prompts [R, length - digits] -> keys
        [R, digits]. at_most: the share of keys that are right in every symbol, where distances are drawn evenly.
        ValueError for a length that no document has."""
        possible, guess = self.distances(length), _ids(self.alphabet[0] * self.digits)
        near = sum(distance <= length // 2 for distance in possible) / len(possible)
        found = {
            "always the same key": Shortcut(lambda x: np.tile(guess, (len(x), 1)), self.chance),
            "last symbols": Shortcut(lambda x: x[:, x.shape[1] - self.digits :], 0.0),
            "always the same place": Shortcut(lambda x: self._at(x, possible[len(possible) // 2]), 1 / len(possible)),
            "the nearer half": Shortcut(
                lambda x: self._held(x[:, -(length // 2) :], guess), near + (1 - near) * self.chance
            ),
        }
        if self.digits > 1:
            one = float(len(self.alphabet)) ** (1 - self.digits)
            found["its first symbol alone"] = Shortcut(self._first, one)
        return found

    def _at(self, prompts: Ids, distance: int) -> Ids:
        """What stands where a key at this distance does."""
        start = prompts.shape[1] - distance
        return prompts[:, start : start + self.digits]

    def _held(self, rows: Ids, guess: Ids) -> Ids:
        """The symbols of the alphabet in each row where it has a whole key, else a guess."""
        symbols = np.isin(rows, _ids(self.alphabet))
        whole = symbols.sum(1) == self.digits
        found = np.tile(guess, (len(rows), 1))
        found[whole] = rows[whole][symbols[whole]].reshape(-1, self.digits)
        return found

    def _first(self, prompts: Ids) -> Ids:
        """The key's first symbol, as often as there are digits."""
        keys = np.stack([self.solve(prompt) for prompt in prompts])
        return np.repeat(keys[:, :1], self.digits, 1)


def accuracy(examples: Sequence[Example], answers: Sequence[Sequence[int] | NDArray[np.int64]]) -> float:
    """The share of answers that are right in every symbol."""
    right = (list(map(int, given)) == e.answer.tolist() for e, given in zip(examples, answers, strict=True))
    return sum(right) / len(examples)


def _ids(text: str) -> NDArray[np.int64]:
    return np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64)
