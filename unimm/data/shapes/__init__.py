"""The picture world: a seeded, unlimited, offline source of scenes, prompts and conversations.

Scenes hold one to four flat objects with anti-aliased edges at free positions on a plain background (`world`).
Everything that is said about them (`language`) follows from the scene by rule, so every answer and every verdict is
exact.
"""

from unimm.data.shapes.language import (
    TAGS,
    Prompt,
    Turn,
    sample_captioned_scene,
    sample_conversation,
    sample_prompt,
    sample_questions,
)
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
