"""The shapes data set: a seeded, unlimited, offline source of scenes, prompts and conversations.

Scenes have one to four flat objects with anti-aliased edges at arbitrary positions on a plain background (`world`).
Captions and answers (`prompts`, `conversations`) are derived from the scene by rule, so every answer and verdict is
exact.
"""

from unimm.data.shapes.conversations import Turn, sample_conversation, sample_questions
from unimm.data.shapes.prompts import TAGS, Prompt, sample_captioned_scene, sample_prompt
from unimm.data.shapes.world import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    WITHHELD,
    Scene,
    SceneObject,
    render,
    render_array,
    sample_scene,
)

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "SHAPES",
    "TAGS",
    "WITHHELD",
    "Prompt",
    "Scene",
    "SceneObject",
    "Turn",
    "render",
    "render_array",
    "sample_captioned_scene",
    "sample_conversation",
    "sample_prompt",
    "sample_questions",
    "sample_scene",
]
