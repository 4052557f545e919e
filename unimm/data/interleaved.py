"""Answers of text and images in one turn: "draw a red circle and say what you drew" (PIL images and text, no tensors).

The assistant's turn is written as `generation_mode="interleaved"` generates it: text, if any, the image between its
markers, then text. Sample n is a pure function of (seed, n).
"""

import numpy as np
from PIL import Image

from unimm.data.conversations import Message, message
from unimm.data.shapes import Prompt, Scene, render
from unimm.data.shapes.conversations import describe
from unimm.data.shapes.phrasings import TYPED, sample_request, sample_unknown_request, typed
from unimm.data.shapes.prompts import Split, scene_for
from unimm.data.shapes.things import REFUSAL, THINGS, UNSEEN_THINGS

KINDS = ("imperative", "please", "can_you", TYPED)
SAYING = ("and say what you drew", "and tell me what you drew", "and describe it", "and say what it shows")
ASKING = ("What did you draw?", "What is in your picture?", "Describe your picture.", "what did you draw")
LEAD = "Here you are:"
"""Text before the image; written if and only if the request is a question ("Can you draw ...?")."""
ASKED_SHARE, UNKNOWN_SHARE = 0.25, 0.1  # the description is asked for in a second turn; nothing can be drawn


class ShapesInterleaved:
    """An endless stream of requests that are answered by an image and its description."""

    def __init__(self, seed: int, *, split: Split = "train") -> None:
        self.seed, self.split = seed, split

    def messages(self, index: int) -> list[Message]:
        """Return the messages of sample `index`."""
        rng = np.random.default_rng((self.seed, index))
        form = rng.random()
        if form < UNKNOWN_SHARE:
            request = sample_unknown_request(rng, THINGS if self.split == "train" else UNSEEN_THINGS)
            return [message("user", saying(rng, request)), message("assistant", REFUSAL)]
        request, prompt = sample_interleaved(rng, split=self.split, say=form >= UNKNOWN_SHARE + ASKED_SHARE)
        scene = scene_for(rng, prompt)
        if form >= UNKNOWN_SHARE + ASKED_SHARE:
            return [message("user", request), answer(request, scene)]
        asked = message("user", str(rng.choice(ASKING)))
        drawn = {"role": "assistant", "content": [_image(render(scene))]}
        return [message("user", request), drawn, asked, message("assistant", f"{describe(scene)}.")]


def sample_interleaved(rng: np.random.Generator, *, split: Split = "train", say: bool = True) -> tuple[str, Prompt]:
    """Sample a request for a drawing and, with `say`, its description; return its text and the prompt in it."""
    kind, prompt = sample_request(rng, str(rng.choice(KINDS)), split=split)
    if not say:
        return prompt.prompt, prompt
    request = saying(rng, prompt.prompt)
    return (typed(request) if kind == TYPED else request), prompt


def saying(rng: np.random.Generator, request: str) -> str:
    """Add to a request that the drawing shall be described."""
    end = request[-1] if request[-1] in ".?" else ""
    return f"{request.rstrip('.?')} {rng.choice(SAYING)}{end}"


def answer(request: str, scene: Scene) -> Message:
    """Return the assistant's turn: the image of the scene and its description."""
    content = [_image(render(scene)), {"type": "text", "text": f"{describe(scene)}."}]
    if request.endswith("?"):
        content.insert(0, {"type": "text", "text": LEAD})
    return {"role": "assistant", "content": content}


def _image(image: Image.Image) -> dict[str, object]:
    return {"type": "image", "image": image}
