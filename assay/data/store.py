"""Token stores: what a run trains on, wherever fsspec reaches (s3://, gs://, https://, memory://, a folder), streamed.

A store is a folder of parts, each the ids of some documents as `assay.data.shards` writes them (raw little-endian
uint16 or uint32, every document ended by its end-of-text id), and `index.json`, which is written last:

    format       "assay-token-store"
    version      1
    dtype        "<u2" or "<u4"
    tokenizer    digest of the tokenizer
    token_bytes  for every id of the vocabulary, how many UTF-8 bytes it stands for (0: a special token)
    train        the parts to train on: {name, sha256, offsets}, offsets as in a shard: where each document starts
    valid        the parts to validate on

A part is fetched whole when its first row is read, checked, and held in memory until others are; nothing is written.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.data.draws import permutation
from assay.data.loader import Batch, Loader, Source, windows
from assay.data.packing import Epochs, Packing, Rows
from assay.data.shards import Shard
from assay.data.tokenizers import Tokenizer

FORMAT, VERSION, INDEX = "assay-token-store", 1, "index.json"
KEYS = ("dtype", "tokenizer", "token_bytes", "train", "valid")
PART_TOKENS = 1 << 24
TOGETHER = 2
"""Parts whose rows are shuffled with one another."""


def filesystem(url: str) -> tuple[Any, str]:
    """What reaches a store, and the store's path there. ValueError for a scheme that nothing installed reaches."""
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    except ImportError:
        raise ValueError(f"{url}: a token store needs fsspec: pip install 'assay[store]'") from None
    try:
        files, path = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{url}: {error}") from None
    return files, path


def publish(train: Shard, valid: Shard | None, tokenizer: Tokenizer, url: str, part_tokens: int = PART_TOKENS) -> None:
    """Write a store. Documents are dealt out to parts in an order drawn once, so that a part is a sample of all."""
    files, root = filesystem(url)
    files.makedirs(root, exist_ok=True)
    dtype = "<u2" if train.vocab_size <= 2**16 else "<u4"
    index: dict[str, Any] = {"format": FORMAT, "version": VERSION, "dtype": dtype, "tokenizer": tokenizer.digest}
    index["token_bytes"] = train.token_bytes.tolist()
    for side, shard in (("train", train), ("valid", valid)):
        index[side] = []
        for number, documents in enumerate(_dealt(shard, part_tokens) if shard is not None else ()):
            data = np.concatenate(documents).astype(dtype).tobytes()
            name = f"{side}-{number:05}.bin"
            files.pipe_file(f"{root}/{name}", data)
            offsets = [0, *np.cumsum([len(d) for d in documents]).tolist()]
            index[side].append({"name": name, "sha256": hashlib.sha256(data).hexdigest(), "offsets": offsets})
    files.pipe_file(f"{root}/{INDEX}", json.dumps(index).encode())


def _dealt(shard: Shard, part_tokens: int) -> Iterator[list[NDArray[np.int64]]]:
    """Documents in lists of at least so many tokens, but for the last."""
    kept: list[NDArray[np.int64]] = []
    for i in permutation(len(shard), "parts"):
        kept.append(shard.document(int(i)))
        if sum(len(d) for d in kept) >= part_tokens:
            yield kept
            kept = []
    if kept:
        yield kept


@dataclass(frozen=True)
class Part:
    """One file of a store, before it is fetched."""

    path: str
    sha256: str
    offsets: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        return int(self.offsets[-1])


@dataclass(frozen=True)
class Store:
    """An opened store: its index, and nothing of its tokens."""

    files: Any
    dtype: str
    tokenizer: str
    token_bytes: NDArray[np.int64]
    train: tuple[Part, ...]
    valid: tuple[Part, ...]
    digest: str

    @classmethod
    def open(cls, url: str) -> Store:
        """ValueError, naming the file and what is wrong, for what is no store."""
        files, root = filesystem(url)
        where = f"{url.rstrip('/')}/{INDEX}"
        try:
            raw = files.cat_file(f"{root}/{INDEX}")
            index = json.loads(raw)
        except FileNotFoundError:
            raise ValueError(f"{where}: no such file: not a token store, or not all of it was written") from None
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("version") != VERSION:
            raise ValueError(f"{where}: not an index of {FORMAT}, version {VERSION}")
        if lacking := [key for key in KEYS if key not in index]:
            raise ValueError(f"{where}: lacks {', '.join(lacking)}")
        if index["dtype"] not in ("<u2", "<u4"):
            raise ValueError(f"{where}: dtype {index['dtype']!r}; accepted: '<u2', '<u4'")
        train, valid = (tuple(_part(root, one, where) for one in index[side]) for side in ("train", "valid"))
        table = np.asarray(index["token_bytes"], np.int64)
        digest = hashlib.sha256(raw).hexdigest()
        return cls(files, index["dtype"], str(index["tokenizer"]), table, train, valid, digest)

    def fetch(self, part: Part) -> Shard:
        """ValueError unless the part is what the index says."""
        data = self.files.cat_file(part.path)
        found = hashlib.sha256(data).hexdigest()
        if found != part.sha256:
            raise ValueError(f"{part.path}: sha256 {found[:12]}..., the index says {part.sha256[:12]}...")
        tokens = np.frombuffer(data, self.dtype)
        if len(tokens) != part.tokens or int(tokens.max()) >= len(self.token_bytes):
            raise ValueError(f"{part.path}: not the {part.tokens} tokens of {len(self.token_bytes)} ids in the index")
        return Shard(tokens, part.offsets, self.token_bytes, part.sha256)

    def whole(self, parts: Sequence[Part]) -> Shard:
        """All documents of these parts at once."""
        found = [self.fetch(part) for part in parts]
        return Shard.of(
            [shard.document(i).tolist() for shard in found for i in range(len(shard))], self.token_bytes.tolist()
        )


def _part(root: str, said: Any, where: str) -> Part:
    name, offsets = (said.get(key) if isinstance(said, Mapping) else None for key in ("name", "offsets"))
    good = isinstance(name, str) and "/" not in name and isinstance(offsets, list) and len(offsets) > 1
    rising = good and offsets[0] == 0 and all(a < b for a, b in pairwise(offsets))  # type: ignore[index,arg-type]
    if not rising:
        raise ValueError(f"{where}: part {name!r}: accepted: a file's name, its sha256, and offsets that rise from 0")
    return Part(f"{root}/{name}", str(said.get("sha256")), np.asarray(offsets, np.int64))


class Streamed:
    """Rows of T + 1 tokens for ever, each a function of its number: every epoch orders the parts anew, and shuffles the
    rows of TOGETHER parts with one another. Of those parts the documents are ordered anew as well (`Epochs`)."""

    key = f"streamed {TOGETHER}"

    def __init__(self, store: Store, length: int, seed: int) -> None:
        self.store, self.length, self.seed = store, length, seed
        self.parts = [part for part in store.train if part.tokens > length]
        self.counts = np.asarray([(part.tokens - 1) // length for part in self.parts], np.int64)
        self.rows = int(self.counts.sum())
        if self.rows < 1:
            raise ValueError(f"length: {length}; no part of the store has the {length + 1} tokens that a row takes")
        self._held: OrderedDict[int, Epochs] = OrderedDict()
        self._laid: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        self._mixed: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def row(self, number: int) -> Rows:
        epoch, place = divmod(number, self.rows)
        order, ends = self._order(epoch)
        group = int(np.searchsorted(ends, place, side="right"))
        members = order[group * TOGETHER : (group + 1) * TOGETHER]
        inside = np.cumsum(self.counts[members])
        chosen = int(self._shuffled(epoch, group, int(inside[-1]))[place - (int(ends[group - 1]) if group else 0)])
        which = int(np.searchsorted(inside, chosen, side="right"))
        part = int(members[which])
        own = chosen - (int(inside[which - 1]) if which else 0)
        return self._part(part).row(epoch * int(self.counts[part]) + own)

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The parts in this epoch's order, and the row after the last one of each group of them."""
        if self._laid is None or self._laid[0] != epoch:
            order = permutation(len(self.parts), "parts", self.seed, epoch)
            sums = np.cumsum(self.counts[order])
            last = np.minimum(np.arange(TOGETHER, len(order) + TOGETHER, TOGETHER), len(order)) - 1
            self._laid = epoch, order, sums[last]
        return self._laid[1:]

    def _shuffled(self, epoch: int, group: int, rows: int) -> NDArray[np.int64]:
        if self._mixed is None or self._mixed[0] != (epoch, group):
            self._mixed = (epoch, group), permutation(rows, "group", self.seed, epoch, group)
        return self._mixed[1]

    def _part(self, number: int) -> Epochs:
        """Held, or fetched in place of the one that was not read for longest: two groups are held, since a batch may
        end in the next one."""
        if number not in self._held:
            while len(self._held) >= 2 * TOGETHER:
                self._held.popitem(last=False)
            self._held[number] = Epochs(self.store.fetch(self.parts[number]), self.length, self.seed)
        self._held.move_to_end(number)
        return self._held[number]


@dataclass(frozen=True)
class StoredData:
    """A store to train on, with the tokenizer that its text was encoded with (`assay.data.dataset.Data`)."""

    store: Store
    tokenizer: Tokenizer
    packing: Packing = "concatenate"
    unique: int | None = None
    valid_packing: Packing = "concatenate"

    @classmethod
    def open(cls, url: str, tokenizer: Tokenizer) -> StoredData:
        """ValueError for a store that was written with another tokenizer."""
        store = Store.open(url)
        if store.tokenizer != tokenizer.digest:
            raise ValueError(
                f"{url}: its tokenizer has digest {store.tokenizer[:12]}..., the recipe's {tokenizer.digest[:12]}..."
            )
        return cls(store, tokenizer)

    @property
    def digest(self) -> str:
        return self.store.digest

    @property
    def validates(self) -> bool:
        return bool(self.store.valid)

    def stream(self, rows: int, length: int, seed: int, mix: Sequence[tuple[Source, float]] = ()) -> Loader:
        """Rows of the training parts; mix: `assay.data.loader.Loader`."""
        if {self.packing, self.valid_packing} != {"concatenate"} or self.unique is not None:
            raise ValueError(
                "batch.packing, batch.epochs, evaluation.packing: a store is streamed as it is: leave them out"
            )
        none = np.zeros(0, np.int64)
        index = Shard(none, none, self.store.token_bytes, self.digest)
        return Loader(index, rows, length, seed, mix, Streamed(self.store, length, seed))

    def held_out(self, length: int, count: int) -> Batch:
        """Windows from all over the validation documents, which are fetched whole."""
        return windows(self.store.whole(self.store.valid), length, count)
