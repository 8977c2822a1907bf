"""Where pages go that memory no longer has: host memory, a disk, a store that processes share. Storage and no maths.

A tier may lose or refuse anything: what it returns is checked, and what it does not is computed again.
"""

from assay.cache.tiers.disk import DiskTier
from assay.cache.tiers.memory import MemoryTier
from assay.cache.tiers.record import Scope
from assay.cache.tiers.remote import FsspecTier, RedisTier
from assay.cache.tiers.stack import Tiers
from assay.cache.tiers.tier import Stats, Tier

__all__ = ["DiskTier", "FsspecTier", "MemoryTier", "RedisTier", "Scope", "Stats", "Tier", "Tiers"]
