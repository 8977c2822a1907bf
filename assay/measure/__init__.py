"""Measurements of a model: one file a topic, each a function of a `Subject` that returns rows, units in their names.

`assay.measure.topics.run(name, subject, options)` runs one; a new file with a `measure` function is a new topic.
"""
