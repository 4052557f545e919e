"""Which of many images another one is nearest to, pixel by pixel."""

import numpy as np


def nearest_images(drawn: np.ndarray, references: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compare by the mean squared difference of all pixels.

    Args:
        drawn: uint8 [n, H, W, 3]. references: uint8 [N, H, W, 3].
        own: the row of `references` that each drawing is meant to be, [n].

    Returns:
        The nearest row of each drawing (the first of equals) and the rank of its own, 1 where none is nearer; both [n].

    Raises:
        ValueError: images of another size.
    """
    if drawn.shape[1:] != references.shape[1:]:
        raise ValueError(f"drawings of {drawn.shape[1:]} cannot be compared with images of {references.shape[1:]}")
    flat, table = (images.reshape(len(images), -1).astype(np.float64) for images in (drawn, references))
    # whole numbers below 2**53: exact, and so are the comparisons
    distances = (table**2).sum(axis=1) - 2 * flat @ table.T + (flat**2).sum(axis=1)[:, None]
    nearer = (distances < distances[np.arange(len(flat)), own][:, None]).sum(axis=1)
    return distances.argmin(axis=1), nearer + 1
