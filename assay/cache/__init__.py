"""Stores for the state that parts declare: allocation, tables of what stands where, bytes. No maths."""

from assay.cache.cache import Cache, Slot
from assay.cache.size import Bytes, Size, predict

__all__ = ["Bytes", "Cache", "Size", "Slot", "predict"]
