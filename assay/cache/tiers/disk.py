"""Records as files in a folder that several processes of one user may share."""

from __future__ import annotations

import fcntl
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from assay.cache.tiers.tier import Tier

_RECORD = re.compile(r"[0-9a-f]{64}\.safetensors")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.part")
LOCK = ".lock"


class DiskTier(Tier):
    """A safetensors file a record, mode 600, in a folder of mode 700. The folder is the index: a start finds what an
    earlier process left, and a file's time of change is when it was used last.

    Writers hold one lock, over processes too: the bound is never passed, and a temporary file that another writer
    finds is a dead one's. Readers hold none, since a file appears whole, by a rename after it has reached the disk. The
    folder is listed before each write. ValueError for a folder that others may enter.
    """

    def __init__(self, folder: str | Path, bound: int) -> None:
        super().__init__(bound)
        self.folder, self._thread = Path(folder), threading.Lock()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = self.folder.stat()
        if about.st_mode & 0o077 or about.st_uid != os.geteuid():
            mode = stat.S_IMODE(about.st_mode)
            raise ValueError(f"cache folder {self.folder}: mode {mode:o} of user {about.st_uid}; accepted: 700, yours")
        with self._alone():
            found = self._scan()
            self._count(foreign=self._foreign(), evicted=self._make_room(found, 0))

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._thread:
            lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
            finally:
                os.close(lock)

    def _scan(self) -> list[tuple[int, int, str]]:
        """(last use in ns, bytes, file) of every record. Removes what a killed writer left; only under the lock."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _TEMPORARY.fullmatch(entry.name):
                    os.unlink(entry.path)
                elif _RECORD.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    about = entry.stat(follow_symlinks=False)
                    found.append((about.st_mtime_ns, about.st_size, entry.name))
        return sorted(found)

    def _foreign(self) -> int:
        with os.scandir(self.folder) as entries:
            return sum(
                not (_RECORD.fullmatch(e.name) and e.is_file(follow_symlinks=False)) for e in entries if e.name != LOCK
            )

    def _make_room(self, found: list[tuple[int, int, str]], size: int) -> int:
        total, evicted = sum(held for _, held, _ in found), 0
        while total + size > self.bound:
            _, held, file = found[evicted]
            os.unlink(self.folder / file)
            total, evicted = total - held, evicted + 1
        return evicted

    def _read(self, name: str) -> bytes | None:
        try:
            with open(os.open(self.path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                blob = file.read(self.bound + 1)
            self._touch(self.path(name))
        except FileNotFoundError:
            return None
        return blob

    def _touch(self, path: Path) -> None:
        """Used now. In nanoseconds by the clock: a file system's own times are a few milliseconds coarse."""
        now = time.time_ns()
        os.utime(path, ns=(now, now))

    def _write(self, name: str, blob: bytes) -> int:
        part = self.folder / f".{name}.part"
        with self._alone():
            evicted = self._make_room([f for f in self._scan() if f[2] != f"{name}.safetensors"], len(blob))
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(part, flags, 0o600), "wb") as file:
                file.write(blob)
                file.flush()
                os.fsync(file.fileno())
            self._touch(part)
            os.rename(part, self.path(name))
            self._sync()
        return evicted

    def _sync(self) -> None:
        """The rename itself to the disk."""
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _drop(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def _has(self, name: str) -> bool:
        return self.path(name).is_file()

    def held(self) -> int:
        with self._alone():
            return sum(size for _, size, _ in self._scan())
