"""Nearest-neighbor search among images by pixel distance."""

import numpy as np


def nearest_images(drawn: np.ndarray, references: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest reference of each generated image by the mean squared difference of all pixels.

    Args:
        drawn: generated images, uint8 [n, H, W, 3].
        references: uint8 [N, H, W, 3].
        own: the row of `references` that each generated image should match, [n].

    Returns:
        The nearest row of each image (the first of equals) and the rank of its own, 1 if none is nearer; both [n].

    Raises:
        ValueError: the image sizes differ.
    """
    if drawn.shape[1:] != references.shape[1:]:
        raise ValueError(f"drawings of {drawn.shape[1:]} cannot be compared with images of {references.shape[1:]}")
    flat, table = (images.reshape(len(images), -1).astype(np.float64) for images in (drawn, references))
    # integers below 2**53 are exact in float64, and so are the comparisons
    distances = (table**2).sum(axis=1) - 2 * flat @ table.T + (flat**2).sum(axis=1)[:, None]
    nearer = (distances < distances[np.arange(len(flat)), own][:, None]).sum(axis=1)
    return distances.argmin(axis=1), nearer + 1
