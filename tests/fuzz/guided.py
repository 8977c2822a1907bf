"""`python -m tests.fuzz.guided [NAME ...] [--minutes M] [--out FOLDER]`: a search guided by coverage, from good files.

FOLDER/NAME keeps what reaches new lines, so that a search goes on where it was. FOLDER/NAME-found gets the bytes of
every defect: an exception that is no ValueError (one of each kind, with its traceback beside), more than 2 s of the
processor, 300 MB more memory, a crash, a hang. Exit status 1 where there are any. It needs atheris, which is no
dependency: without it nothing is done.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("gguf", "safetensors", "config", "tokenizer", "yaml")
WATCHED = ["assay.data", "assay.hub", "assay.spec", "assay.parts"]
SECONDS, MEGABYTES, HANG, LIMIT, LONGEST = 2.0, 300, 120, 2048, 1 << 16
"""What a unit may take of the processor and of memory, after what time it hangs; the memory of all; bytes of a file."""
LONGER = {"config": 20.0}  # it is read as each of some forty families, and thousands of layers take one half a second


@dataclass
class Watch:
    """Runs a target and writes down what it should not do, so that the search goes on."""

    name: str
    holds: Callable[[str, bytes], bool]
    found: Path
    seen: set[str] = field(default_factory=set)

    def __call__(self, data: bytes) -> None:
        began, before = time.process_time(), peak()
        try:
            self.holds(self.name, data)
        except BaseException as error:  # a panic of a library in Rust is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            self.told(data, "raises", kind_of(error), traceback.format_exc())
        took, grown = time.process_time() - began, peak() - before
        if took > LONGER.get(self.name, SECONDS):
            self.told(data, "slow", f"{took:.0f} s", f"{took:.1f} s of the processor")
        if grown > MEGABYTES:
            self.told(data, "large", f"{grown // 100}00 MB", f"{grown} MB more")

    def told(self, data: bytes, what: str, kind: str, how: str) -> None:
        if (key := f"{what} {kind}") in self.seen:
            return
        self.seen.add(key)
        path = self.found / f"{what}-{hashlib.sha1(data).hexdigest()[:12]}"
        path.write_bytes(data)
        path.with_suffix(".txt").write_text(f"{key}\n{how}")
        print(f"== {self.name}: {key}: {path}", file=sys.stderr, flush=True)


def peak() -> int:
    """MB that this process ever had at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def kind_of(error: BaseException) -> str:
    """An exception's type and the innermost line that is ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/assay/" in f.filename] or list(frames)
    return f"{type(error).__name__} {Path(ours[-1].filename).name}:{ours[-1].lineno}"


def search(name: str, out: Path, options: list[str]) -> None:
    """In a process of its own: libFuzzer's loop, which does not return."""
    import atheris

    with atheris.instrument_imports(include=WATCHED):
        from assay.hub.family import families, find
        from tests.fuzz.mutate import CHANGES, changed
        from tests.fuzz.seeds import seeds
        from tests.fuzz.targets import holds

        for kind in families():
            find(kind)  # read when they are wanted, which would be too late to be seen
    folder, found = out / name, out / f"{name}-found"
    for i, data in enumerate(seeds(name)):
        (folder / f"good-{i:02}").write_bytes(data)
        holds(name, data)  # so that no unit is slow because something is imported

    def another(data: bytes, most: int, number: int) -> bytes:
        """Two of three times one thing changed that keeps the file's form; else any bytes."""
        made = changed(name, data, number) if number % 3 else None
        return made if made is not None and len(made) <= most else atheris.Mutate(data, most)

    own = {"custom_mutator": another} if name in CHANGES else {}
    atheris.Setup([sys.argv[0], str(folder), *options], Watch(name, holds, found), **own)
    atheris.Fuzz()


def supervised(name: str, out: Path, seconds: float) -> list[Path]:
    """What was found until the time was up; a search that a crash or a hang ended is begun again."""
    found, until = out / f"{name}-found", time.monotonic() + seconds
    for folder in (out / name, found):
        folder.mkdir(parents=True, exist_ok=True)
    while (left := int(until - time.monotonic())) > 0:
        limits = {"max_total_time": left, "timeout": HANG, "rss_limit_mb": LIMIT, "max_len": LONGEST}
        options = [f"-{key}={value}" for key, value in limits.items()]
        options += [f"-artifact_prefix={found}/", "-len_control=0", "-print_final_stats=1", "-report_slow_units=3600"]
        child = [sys.executable, "-m", "tests.fuzz.guided", name, "--out", str(out), "--search", *options]
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(child, timeout=left + 2 * HANG, check=False)
            if done.returncode and not any(found.iterdir()):
                raise SystemExit(f"{name}: the search ended with {done.returncode} and kept nothing")
    return sorted(path for path in found.iterdir() if path.suffix != ".txt")


def main() -> int:
    options = argparse.ArgumentParser(description="Look for files that the readers do not withstand.")
    options.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    options.add_argument("--minutes", type=float, default=20.0, help="for each")
    options.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    options.add_argument("--search", action="store_true", help=argparse.SUPPRESS)
    given, more = options.parse_known_args()
    if odd := set(given.names) - set(NAMES):
        options.error(f"{', '.join(sorted(odd))}; accepted: {', '.join(NAMES)}")
    if importlib.util.find_spec("atheris") is None:
        print("nothing is searched: atheris is not installed (pip install atheris)", file=sys.stderr)
        return 0
    if given.search:
        search(given.names[0], given.out, more)
    found = [path for name in given.names or NAMES for path in supervised(name, given.out, 60 * given.minutes)]
    print("\n".join(map(str, found)) or "nothing was found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
