"""Contradictions: pairs that stand in the training data with both labels.

In: columns. Out: which rows are such pairs, in either order of their texts.
Invariant: of a pair with both labels no copy stays.
Trade-off: which label is right is not guessed, not even from a majority of 9 to 1.
"""

from __future__ import annotations

import numpy as np

from sftcore.data.filters.columns import Columns, Mask, is_in


def contradictions(columns: Columns) -> Mask:
    """Pairs that occur with label 0 and with label 1."""
    items, labels = columns.items, columns.labels
    same, different = np.unique(items[labels == 1]), np.unique(items[labels == 0])
    return is_in(items, same) & is_in(items, different) & (labels >= 0)
