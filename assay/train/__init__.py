"""Training: the recipe, the one loop, checkpoints, evaluation. `assay.train.loop.train` is the way in."""
