"""Stores for the state that parts declare: allocation, tables of what stands where, bytes. No maths."""

from assay.cache.cache import Cache
from assay.cache.paged import Paged
from assay.cache.size import Bytes, PageSize, Size, predict, within
from assay.cache.store import Slot, Swapped

__all__ = ["Bytes", "Cache", "PageSize", "Paged", "Size", "Slot", "Swapped", "predict", "within"]
