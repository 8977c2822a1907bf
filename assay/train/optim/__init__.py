"""Optimisers, one file each, and the groups of weights they work on."""
