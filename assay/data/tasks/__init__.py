"""Synthetic diagnostics, one file each: a generator, the solver that reaches 100 %, and what guessing reaches."""
