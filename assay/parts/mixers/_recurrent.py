"""What mixers with a state for each sequence share."""

from __future__ import annotations

from assay.parts.base import InLanes, Mixer


class Recurrent(InLanes, Mixer):
    """A mixer that runs over lanes."""
