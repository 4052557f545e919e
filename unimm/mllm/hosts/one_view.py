"""`OneViewMixin`, for hosts that tile images."""

from typing import Any

from torch import Tensor


class OneViewMixin:
    """Mixin for hosts that tile images (AnyRes). With `image_sizes` (from their own processor) they do; without, an
    image is a single view of the tokenizer's size, as `UnimmProcessor` returns it and as images are generated."""

    tiles = True

    def get_image_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None, **kwargs: Any) -> Any:
        """Return the projected patches as `pooler_output`, one [n, D] per image."""
        if image_sizes is not None:
            return super().get_image_features(pixel_values, image_sizes=image_sizes, **kwargs)  # type: ignore[misc]
        inside: Any = self.model  # type: ignore[attr-defined]
        outputs = inside.vision_tower(pixel_values)
        outputs.pooler_output = list(inside.multi_modal_projector(outputs.last_hidden_state))
        return outputs
