"""Laws of scale: ladders of real runs, fits with intervals, plans, and search."""
