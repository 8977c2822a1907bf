"""One training run on many processes: a mesh of named axes, counted collectives, and a plan for each axis.

A plan is a file with `apply(model, mesh) -> None`, called on every process after the model was built and before its
weights are drawn or read. The learner calls those whose axis is larger than 1, in the order pipeline, tensor, expert,
context, and last the replicas and shards.
"""
