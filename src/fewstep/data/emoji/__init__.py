"""The emoji set: real text–image pairs made from packages alone, with prompts that have many answers."""

from fewstep.data.emoji.catalogue import Concept, concepts
from fewstep.data.emoji.dataset import EmojiSettings, class_names, emoji_samples
from fewstep.data.emoji.drawing import STYLES, draw_emoji
from fewstep.data.emoji.scenes import Scene, compose, describe, random_scene

__all__ = [
    "STYLES",
    "Concept",
    "EmojiSettings",
    "Scene",
    "class_names",
    "compose",
    "concepts",
    "describe",
    "draw_emoji",
    "emoji_samples",
    "random_scene",
]
