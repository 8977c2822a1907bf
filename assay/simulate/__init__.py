"""Serving, simulated: request traces, the time of a step, and the engine's own scheduler. No torch but in `preset`."""
