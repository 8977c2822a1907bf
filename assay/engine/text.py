"""Text of a reply as it grows: whole characters only, and nothing that may still turn out to be a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from assay.data.tokenizers import Tokenizer


class Reply:
    """`push` returns the text that is certain; `stopped` says that a stop text has come. Its pieces make the reply.

    least: stop texts are looked for behind the text of so many tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), least: int = 0) -> None:
        self._stream, self._stop, self._least = tokenizer.stream(), tuple(stop), least
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        text = self._stream.push(token)
        if self._least:
            self._least -= 1
            return text
        return self._release(text)

    def finish(self) -> str:
        """The rest, once no more tokens come."""
        text = self._release(self._stream.finish()) + self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        self._held += new
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            text, self._held, self.stopped = self._held[: min(found)], "", True
            return text
        keep = max((overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text


def overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
