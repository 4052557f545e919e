"""Images of shuffled patches of the shapes data set, to learn copying from.

In scenes most patches can be guessed from their neighbors, so a model hardly needs to look at the image that it edits.
Shuffled patches cannot be guessed: only copying lowers the loss.
"""

import numpy as np
from PIL import Image

from unimm.data.shapes.edits import sample_edit
from unimm.data.shapes.world import IMAGE_SIZE, render_array

PATCH = 8
PLAIN_WEIGHT = 0.15  # of a patch of one color, among others
PLAIN_DEVIATION = 3.0  # gray levels below which a patch has one color


def shuffled_patches(rng: np.random.Generator) -> Image.Image:
    """Return an image [64, 64] of patches [8, 8] drawn at random from two scenes, few of them of one color."""
    patches = np.concatenate([_patches(render_array(sample_edit(rng).source)) for _ in range(2)])
    plain = patches.reshape(len(patches), -1).std(1) < PLAIN_DEVIATION
    weights = np.where(plain, PLAIN_WEIGHT, 1.0)
    side = IMAGE_SIZE // PATCH
    drawn = patches[rng.choice(len(patches), size=side * side, p=weights / weights.sum())]
    rows = drawn.reshape(side, side, PATCH, PATCH, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(rows.reshape(IMAGE_SIZE, IMAGE_SIZE, 3))


def _patches(pixels: np.ndarray) -> np.ndarray:
    """Cut an image [H, W, 3] into its patches [N, 8, 8, 3]."""
    rows, columns = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    cut = pixels.reshape(rows, PATCH, columns, PATCH, 3).transpose(0, 2, 1, 3, 4)
    return cut.reshape(-1, PATCH, PATCH, 3)
