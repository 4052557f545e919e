"""Images as conditions of drawing: token ids that are kept. B prompts, S sequences, M image tokens."""

import torch
from torch import Tensor

from unimm.errors import UserError
from unimm.mllm.vocabulary import VisualVocabulary

DRAWN = -1
"""The entry of a token that is drawn, not forced."""


def forced_rows(given: Tensor | None, batch: int, repeats: int, length: int, vocabulary: VisualVocabulary) -> Tensor:
    """Return the forced token ids of every sequence, [S, M] with -1 for tokens to draw, S = batch * repeats.

    Args:
        given: token ids [B, M], or one row per sequence, [S, M]; None forces nothing.

    Raises:
        UserError: if the shape is another, or an entry is neither -1 nor an image id.
    """
    if given is None:
        return torch.full((batch * repeats, length), DRAWN)
    shapes = [[rows, length] for rows in sorted({batch, batch * repeats})]
    whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    if list(given.shape) not in shapes or not whole:
        raise UserError(
            f"forced_token_ids has the shape {list(given.shape)} and the type {given.dtype}: give whole numbers as "
            f"{' or '.join(map(str, shapes))}, -1 for tokens to draw."
        )
    rows = given.detach().long().cpu()
    wrong = rows[(rows != DRAWN) & ~vocabulary.contains(rows)]
    if len(wrong):
        raise UserError(
            f"forced_token_ids holds {int(wrong[0])}: image ids are {vocabulary.base} to {vocabulary.end - 1} in this "
            "model's vocabulary, and -1 is a token to draw."
        )
    return rows if len(rows) == batch * repeats else rows.repeat_interleave(repeats, 0)
