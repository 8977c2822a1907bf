"""Whether a client's grammar is compiled in time, found out in a process that can be ended.

llguidance bounds most of its work, but not the search for what several patterns of a schema (`allOf`) have in common,
whose time grows exponentially with their number: 12 took 0.02 s, 16 2.2 s, 18 29 s. A thread that is inside of it
cannot be stopped, and it would be the engine's. So each grammar is read first by a Python of its own, which imports
nothing else; this file is that program too.
"""

from __future__ import annotations

import resource
import signal
import subprocess
import sys

PATIENCE = 15
"""Times the processor time, by the clock: on a busy machine a process waits for its turn."""


def problem(text: str, seconds: int) -> str | None:
    """Why this grammar, in llguidance's notation, is not compiled within so many seconds of processor time; None where
    it is, or is refused at once for what it says."""
    command = [sys.executable, "-P", __file__, str(seconds)]
    too_long = f"compiling it takes more than {seconds} s"
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=PATIENCE * seconds)
    except subprocess.TimeoutExpired:
        return too_long
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return too_long
    return f"compiling it ended with signal {-done.returncode}" if done.returncode < 0 else None


def main(seconds: int) -> None:
    from llguidance import LLMatcher

    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (most, most + 1))
    LLMatcher.validate_grammar(sys.stdin.read())


if __name__ == "__main__":
    main(int(sys.argv[1]))
