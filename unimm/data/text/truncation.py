"""Truncation of conversations to a maximum number of tokens.

An image is kept whole or not at all: a row ends before the first image that does not fit, and that image is not encoded
either. If a row has no labels left, the collator drops the sample from its batch.
"""

import numpy as np


def fitting(input_ids: np.ndarray, capacity: int, image_token_id: int, tokens_per_image: int) -> tuple[int, int]:
    """Return how many of the tokens [L] are kept, and how many of their images.

    Args:
        input_ids: token ids of one row, without padding.
        capacity: maximum number of tokens to keep.
        tokens_per_image: number of placeholders for one image.
    """
    placeholders = np.flatnonzero(input_ids == image_token_id)
    within = int((placeholders < capacity).sum())
    whole = within // tokens_per_image
    if within % tokens_per_image:
        return int(placeholders[whole * tokens_per_image]), whole
    return min(capacity, len(input_ids)), whole
