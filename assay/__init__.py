"""assay: a laboratory for language-model architectures.

>>> import assay
>>> assay.bill(assay.spec("gpt-11m", layers=4)).params["total"]
7277952
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import assay.spec
import assay.study

if TYPE_CHECKING:
    from assay.api import bill, load

__version__ = "0.1.0"
__all__ = ["__version__", "bill", "load", "spec", "study"]


class _CallableModule(ModuleType):
    """`assay.spec` is the package of specs, and as a function it makes one; `assay.study` runs one."""

    def __call__(self, *args: Any, **changes: Any) -> Any:
        from assay import api

        return getattr(api, self.__name__.rpartition(".")[2])(*args, **changes)


assay.spec.__class__ = _CallableModule
assay.study.__class__ = _CallableModule


def __getattr__(name: str) -> Any:
    if name not in ("bill", "load"):
        raise AttributeError(f"module 'assay' has no attribute {name!r}")
    from assay import api

    return getattr(api, name)
