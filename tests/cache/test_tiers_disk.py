"""Files of a tier: rights, restarts, several processes, death in the middle of a write."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from assay.cache.tiers import DiskTier
from assay.cache.tiers.record import pack
from tests.cache.tiers import SHAPES, name, record, same

SIZE = len(pack(name(0), record(0)))
ROOT = Path(__file__).parents[2]


def forked(work: Callable[[Callable[[], object]], None]) -> tuple[int, int]:
    """A child process at `work`, which may say that it has come so far; its id, and where its words arrive."""
    ear, mouth = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(lambda: os.write(mouth, b"."))
        finally:
            os._exit(0)
    os.close(mouth)
    return child, ear


def kill(child: int, ear: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ear)


def size(folder: Path) -> int:
    """Of every file there, at one moment: a listing takes a while, in which one file may go and another come, and only
    what two of them have in common stood there between them."""
    before: dict[str, tuple[int, int]] = {}
    while True:
        found = {}
        with os.scandir(folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    about = entry.stat(follow_symlinks=False)
                    found[entry.name] = about.st_size, about.st_mtime_ns
        if found == before:
            return sum(held for held, _ in found.values())
        before = found


def test_only_the_owner_reads(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        tier = DiskTier(tmp_path / "a" / "b", 3 * SIZE)
        tier.put(name(1), record(1))
    finally:
        os.umask(old)
    assert tier.folder.stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in tier.folder.iterdir()} == {0o600}
    tier.folder.chmod(0o750)
    with pytest.raises(ValueError, match=r"mode 750 of user .*; accepted: 700, yours"):
        DiskTier(tier.folder, SIZE)


def test_a_restart_finds_what_was_there(tmp_path: Path) -> None:
    """In its order of use; a smaller bound holds from the start; what is no record is left alone."""
    tier = DiskTier(tmp_path / "t", 9 * SIZE)
    for number in (1, 2, 3):
        tier.put(name(number), record(number))
    assert same(tier.get(name(1), SHAPES), 1)
    (tier.folder / "notes.txt").write_text("mine")
    (tier.folder / f"{name(8)}.safetensors").symlink_to(tmp_path / "elsewhere")
    again = DiskTier(tier.folder, 2 * SIZE)
    assert again.stats()["foreign"] == 2 and again.stats()["evicted"] == 1
    assert [same(again.get(name(n), SHAPES), n) for n in (1, 2, 3)] == [True, False, True]
    assert (tier.folder / "notes.txt").read_text() == "mine" and again.get(name(8), SHAPES) is None


@pytest.mark.parametrize("keep", [0, 1, 8, SIZE // 2, SIZE - 1])
def test_a_file_cut_short_is_absent(tmp_path: Path, keep: int) -> None:
    tier = DiskTier(tmp_path / "t", 3 * SIZE)
    tier.put(name(1), record(1))
    os.truncate(tier.path(name(1)), keep)
    again = DiskTier(tier.folder, 3 * SIZE)
    assert again.get(name(1), SHAPES) is None and again.stats()["damaged"] == 1
    assert not tier.path(name(1)).exists()


def test_a_folder_that_vanishes_is_absence(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "t", 3 * SIZE)
    tier.folder.rename(tmp_path / "gone")
    tier.put(name(1), record(1))
    assert tier.get(name(1), SHAPES) is None and tier.stats()["failed"] == 1


def test_a_second_process_hits_what_the_first_stored(tmp_path: Path) -> None:
    DiskTier(tmp_path / "t", 9 * SIZE).put(name(5), record(5))
    text = (
        "from tests.cache.tiers import *\nfrom assay.cache.tiers import DiskTier\n"
        f"tier = DiskTier({str(tmp_path / 't')!r}, {9 * SIZE})\n"
        "print(same(tier.get(name(5), SHAPES), 5), tier.stats()['hits'])"
    )
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout.split() == ["True", "1"]


def test_killed_while_it_writes(tmp_path: Path) -> None:
    """Killed with half of the temporary file on disk and the lock held: nothing half-written is ever a record, the
    lock is free again, and the next writer removes the rest."""
    tier = DiskTier(tmp_path / "t", 9 * SIZE)

    def work(say: Callable[[], object]) -> None:
        def halt(number: int) -> None:
            os.ftruncate(number, os.fstat(number).st_size // 2)
            say()
            time.sleep(60)

        tier.put(name(1), record(1))
        os.fsync = halt  # type: ignore[assignment]
        tier.put(name(2), record(2))

    child, ear = forked(work)
    os.read(ear, 1)
    assert (tier.folder / f".{name(2)}.part").stat().st_size == SIZE // 2
    kill(child, ear)
    again = DiskTier(tier.folder, 9 * SIZE)
    assert not list(again.folder.glob(".*.part"))
    assert same(again.get(name(1), SHAPES), 1) and again.get(name(2), SHAPES) is None
    again.put(name(2), record(2))
    assert same(again.get(name(2), SHAPES), 2) and again.stats()["damaged"] == 0


@pytest.mark.parametrize("wait", [0.0, 0.002, 0.01])
def test_killed_at_any_time(tmp_path: Path, wait: float) -> None:
    """Whenever a writer dies, every file with a record's name is whole."""
    tier, names = DiskTier(tmp_path / "t", 20 * SIZE), {name(n): n for n in range(200)}

    def work(say: Callable[[], object]) -> None:
        for stem, number in names.items():
            tier.put(stem, record(number))
            say()

    child, ear = forked(work)
    for _ in range(30):
        os.read(ear, 1)
    time.sleep(wait)
    kill(child, ear)
    files = [path.stem for path in tier.folder.glob("*.safetensors")]
    assert 19 <= len(files) <= 20 and all(same(tier.get(stem, SHAPES), names[stem]) for stem in files)


def test_the_bound_holds_under_concurrent_writers(tmp_path: Path) -> None:
    """Two processes and two threads write; whoever looks, at any time, sees no more bytes than allowed."""
    tier = DiskTier(tmp_path / "t", 5 * SIZE + SIZE // 2)

    def put(first: int) -> None:
        for number in range(first, first + 40):
            tier.put(name(number), record(number))

    def work(say: Callable[[], object], first: int) -> None:
        put(first)
        if tier.stats()["puts"] == 40:
            say()

    children = [forked(lambda say, first=first: work(say, first)) for first in (0, 100)]  # type: ignore[misc]
    threads = [threading.Thread(target=put, args=(first,)) for first in (200, 220)]
    for thread in threads:
        thread.start()
    most, busy = 0, dict(children)
    while busy or any(thread.is_alive() for thread in threads):
        most = max(most, size(tier.folder))
        for child in [child for child in busy if os.waitpid(child, os.WNOHANG)[0]]:
            assert os.read(busy[child], 1) == b".", "all 40 were stored"
            os.close(busy.pop(child))
    assert 4 * SIZE < most <= tier.bound
    assert tier.held() == 5 * SIZE and tier.stats()["puts"] >= 60
