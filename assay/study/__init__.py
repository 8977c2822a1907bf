"""Controlled experiments: a study as data, its plan, its runs, and what they show."""
