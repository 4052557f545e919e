"""Conversations cut after a number of tokens, as training on long ones needs.

An image is seen whole or not at all, so a row ends in front of the first one that does not fit, which
is not encoded either. A row may then have nothing left to learn: the collator leaves such a sample out of its batch.
"""

import numpy as np


def fitting(input_ids: np.ndarray, capacity: int, image_token_id: int, tokens_per_image: int) -> tuple[int, int]:
    """How many of the tokens [L] are kept, and how many of their images.

    Args:
        input_ids: of one row, without padding.
        capacity: tokens that are kept at most.
        tokens_per_picture: placeholders that stand for one image.
    """
    placeholders = np.flatnonzero(input_ids == image_token_id)
    within = int((placeholders < capacity).sum())
    whole = within // tokens_per_image
    if within % tokens_per_image:
        return int(placeholders[whole * tokens_per_image]), whole
    return min(capacity, len(input_ids)), whole
