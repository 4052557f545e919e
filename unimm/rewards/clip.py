"""Rewards by a CLIP: CLIP score, and preference models of the same architecture (HPSv2, PickScore)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel

from unimm.errors import UserError, reading
from unimm.evaluation.geneval.color_votes import prepare_view
from unimm.rewards.base import Metadata
from unimm.saving import no_load_report, refuse_holes


class CLIPReward:
    """Cosine similarity of an image and its prompt in a CLIP's space.

    Args:
        path: folder or hub id of a `CLIPModel` with its text tokenizer.
        scaled: multiply it by the checkpoint's own factor, as PickScore does (https://arxiv.org/abs/2305.01569); CLIP
            score and HPSv2 (https://arxiv.org/abs/2306.09341) are not.
        batch_size: images per forward.
    """

    def __init__(self, path: str | Path, *, scaled: bool = False, batch_size: int = 32) -> None:
        self.name, self.scaled, self.batch_size = str(path), scaled, batch_size
        with reading("The CLIP", path), no_load_report():
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            model, info = CLIPModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
            refuse_holes(model, info, path, refuse_unexpected=False)
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @torch.inference_mode()
    def score(self, prompts: Sequence[str], metadata: Sequence[Metadata], images: Sequence[Image.Image]) -> list[float]:
        """Return the similarity of each image to its prompt. Raises UserError if one is not finite."""
        scores: list[float] = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            scores += self._similarities(prompts[part], images[part]).tolist()
        return scores

    def _similarities(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> torch.Tensor:
        config = self.model.config
        longest = config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.model.device)
        views = torch.stack([prepare_view(image.convert("RGB"), config.vision_config.image_size) for image in images])
        shown = self.model.get_image_features(pixel_values=views.to(self.model.device)).pooler_output
        said = self.model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        found = (F.normalize(shown, dim=-1) * F.normalize(said, dim=-1)).sum(-1)
        found = found * self.model.logit_scale.exp() if self.scaled else found
        if not torch.isfinite(found).all():
            raise UserError(f"{self.name} gave scores that are not finite: no image is rewarded with it.")
        return found
