"""Lists of words, and what was counted in them."""

from __future__ import annotations

import numpy as np

from assay.data.tasks._tools import Column, Some, next_symbol
from assay.data.tasks.base import Examples, Ids


def answered(listed: Ids, answers: Some, mark: int) -> Examples:
    """A list, a mark, and answers, each of which is due before it is read."""
    marks = np.full((len(listed), 1), mark)
    asked = np.zeros((len(listed), listed.shape[1] + 1 + answers.shape[1]), np.bool_)
    asked[:, listed.shape[1] + 1 :] = True
    return next_symbol(np.hstack([listed, marks, answers]), asked)


def first_word(inputs: Ids, words: int) -> Column:
    """The first symbol of a row that is one of the words, 0 .. words-1."""
    return np.take_along_axis(inputs, np.argmax(inputs < words, axis=1)[:, None], 1)
