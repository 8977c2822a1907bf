"""Shape checks for the test run: beartype on the annotations that jaxtyping wrote, and on no others.

mypy sees the rest before anything runs; beartype would refuse protocols, and pay for a look at every argument.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import install_import_hook

ARRAYS = re.compile(r"\b(Float|Int|Int64|Int32|UInt8|Int8|Bool|BFloat16|Num|Shaped)\d*\[")

# The packages whose signatures hold tensors; in production the annotations cost nothing.
SHAPED = ("assay.ops", "assay.parts", "assay.model", "assay.cache", "assay.passes", "assay.train")
# ASSAY_NO_SHAPES=1 leaves the code as it is written, for timing and for runs that trace it.
CHECKED = os.environ.get("ASSAY_NO_SHAPES", "") in ("", "0")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its array annotations checked at every call."""
    hints = {name: hint for name, hint in function.__annotations__.items() if ARRAYS.search(str(hint))}
    if not hints:
        return function
    function.__annotations__ = hints
    return beartype(function)


def install() -> None:
    """From here on, those packages are checked as they are imported."""
    if CHECKED:
        install_import_hook(list(SHAPED), f"{checked.__module__}.{checked.__qualname__}")
