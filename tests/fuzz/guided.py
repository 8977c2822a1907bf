"""`python -m tests.fuzz.guided NAME FOLDER [libFuzzer's options]`: a search guided by coverage, from good files.

It needs atheris, which is no dependency.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["assay.hub", "assay.spec.load"]):
    from tests.fuzz.targets import holds


def main() -> None:
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, lambda data: holds(name, data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
