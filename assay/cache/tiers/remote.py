"""Records in a store that machines share: any file system that fsspec reaches, or Redis (extra `store`)."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar

from assay.cache.tiers.tier import Tier

_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")


def _time(about: Mapping[str, Any]) -> float:
    """Seconds; each file system has its own name for it, and its own type."""
    found = next((about[key] for key in _TIMES if about.get(key) is not None), 0.0)
    return found.timestamp() if isinstance(found, datetime) else float(found)


class FsspecTier(Tier):
    """A file a record below `url` (`s3://bucket/folder`, `file:///mnt/shared`, `memory://name`).

    Such stores have neither locks nor times of use, so two things are weaker than on a disk: the bound may be passed
    while several processes write, until the next write, and what goes first is what was written longest ago, except
    for what this process has read since. The store is listed before each write.
    """

    # Each backend raises errors of its own library; whatever went wrong, the page is computed again.
    failures: ClassVar[tuple[type[Exception], ...]] = (Exception,)

    def __init__(self, url: str, bound: int, **options: Any) -> None:
        import fsspec  # type: ignore[import-untyped]

        super().__init__(bound)
        self.files, root = fsspec.core.url_to_fs(url, **options)
        self.root = root.rstrip("/")
        self.files.makedirs(self.root, exist_ok=True)
        self._uses: dict[str, int] = {}
        self._clock, self._alone = 0, threading.Lock()

    def path(self, name: str) -> str:
        return f"{self.root}/{name}.safetensors"

    def _used(self, path: str) -> None:
        with self._alone:
            self._clock += 1
            self._uses[path] = self._clock

    def _read(self, name: str) -> bytes | None:
        try:
            blob: bytes = self.files.cat_file(self.path(name))
        except FileNotFoundError:
            return None
        self._used(self.path(name))
        return blob

    def _found(self) -> dict[str, Mapping[str, Any]]:
        self.files.invalidate_cache()
        below = self.files.find(self.root, detail=True)
        return {path: about for path, about in below.items() if path.endswith(".safetensors")}

    def _write(self, name: str, blob: bytes) -> int:
        found, evicted = self._found(), 0
        total = sum(int(about["size"]) for about in found.values())
        oldest = sorted(found, key=lambda path: (self._uses.get(path, 0), _time(found[path])))
        while total + len(blob) > self.bound and evicted < len(oldest):
            path = oldest[evicted]
            total, evicted = total - int(found[path]["size"]), evicted + 1
            self._remove(path)
        self.files.pipe_file(self.path(name), blob)
        self._used(self.path(name))
        return evicted

    def _remove(self, path: str) -> None:
        with self._alone:
            self._uses.pop(path, None)
        try:
            self.files.rm_file(path)
        except FileNotFoundError:
            return None  # another process was quicker

    def _drop(self, name: str) -> None:
        self._remove(self.path(name))

    def _has(self, name: str) -> bool:
        return bool(self.files.exists(self.path(name)))

    def held(self) -> int:
        return sum(int(about["size"]) for about in self._found().values())


_FORGET = """
local function forget(name)
  redis.call('DEL', KEYS[1] .. ':record:' .. name)
  redis.call('ZREM', KEYS[1] .. ':used', name)
  local size = redis.call('HGET', KEYS[1] .. ':sizes', name)
  if size then
    redis.call('HDEL', KEYS[1] .. ':sizes', name)
    redis.call('DECRBY', KEYS[1] .. ':bytes', size)
  end
end
local function used(name)
  redis.call('ZADD', KEYS[1] .. ':used', redis.call('INCR', KEYS[1] .. ':clock'), name)
end
"""
_DROP = _FORGET + "forget(ARGV[1])"
_GET = (
    _FORGET
    + """
local record = redis.call('GET', KEYS[1] .. ':record:' .. ARGV[1])
if record then used(ARGV[1]) else forget(ARGV[1]) end
return record
"""
)
_PUT = (
    _FORGET
    + """
forget(ARGV[1])
local size, bound, evicted = #ARGV[2], tonumber(ARGV[3]), 0
while tonumber(redis.call('GET', KEYS[1] .. ':bytes') or '0') + size > bound do
  local oldest = redis.call('ZRANGE', KEYS[1] .. ':used', 0, 0)[1]
  if not oldest then break end
  forget(oldest)
  evicted = evicted + 1
end
redis.call('SET', KEYS[1] .. ':record:' .. ARGV[1], ARGV[2])
redis.call('HSET', KEYS[1] .. ':sizes', ARGV[1], size)
redis.call('INCRBY', KEYS[1] .. ':bytes', size)
used(ARGV[1])
return evicted
"""
)


class RedisTier(Tier):
    """Records in Redis 5 or later (or Valkey). What is used, how large it is and what goes first stand beside them,
    and change in one script with them, so the bound holds whoever writes. A key in braces keeps all of it on one node
    of a cluster. A server that evicts by itself is met: a record that is gone is forgotten when it is asked for.
    """

    failures: ClassVar[tuple[type[Exception], ...]] = (Exception,)

    def __init__(self, url: str, bound: int, prefix: str = "{assay}", timeout_s: float = 1.0) -> None:
        import redis

        super().__init__(bound)
        self.prefix = prefix
        self.server = redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
        self._get, self._put, self._forget = (self.server.register_script(text) for text in (_GET, _PUT, _DROP))

    def _read(self, name: str) -> bytes | None:
        found = self._get(keys=[self.prefix], args=[name])
        return bytes(found) if found is not None else None

    def _write(self, name: str, blob: bytes) -> int:
        return int(self._put(keys=[self.prefix], args=[name, blob, self.bound]))

    def _drop(self, name: str) -> None:
        self._forget(keys=[self.prefix], args=[name])

    def _has(self, name: str) -> bool:
        return bool(self.server.exists(f"{self.prefix}:record:{name}"))

    def held(self) -> int:
        return int(self.server.get(f"{self.prefix}:bytes") or 0)

    def close(self) -> None:
        self.server.close()
