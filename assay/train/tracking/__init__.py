"""Metrics told to trackers: one file each, beside metrics.jsonl, which stands for itself."""
