"""The emoji set as webdataset samples, split by concept."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fewstep.data.emoji.catalogue import CATEGORIES, Concept, concepts
from fewstep.data.emoji.drawing import STYLES, has_drawing
from fewstep.data.emoji.scenes import compose, describe, random_scene
from fewstep.data.splits import SPLITS, Split
from fewstep.errors import DataError


class EmojiSettings(BaseModel):
    """What the emoji set holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resolution: int = Field(32, ge=16, le=512, description="side of the pictures in pixels")
    num_train: int = Field(6000, ge=1, description="scenes of training concepts")
    num_evaluate: int = Field(1200, ge=1, description="scenes of held-out concepts, for evaluation alone")
    num_alignment: int = Field(2000, ge=1, description="further scenes, to fit the scorer of text alignment with")
    samples_per_shard: int = Field(500, ge=1, description="samples in one tar")
    held_out_share: float = Field(0.1, gt=0, lt=1, description="share of concepts held out from all training")
    categories: tuple[str, ...] = Field(CATEGORIES, description="Unicode categories that are used")
    classes: bool = Field(
        False,
        description="scenes of one emoji alone, each with its category as its class (member .cls), for teachers "
        "that are given a class instead of a prompt",
    )
    seed: int = Field(0, description="seed of the scenes")

    def num_samples(self, split: Split) -> int:
        """Return how many samples the split has."""
        return {"train": self.num_train, "evaluate": self.num_evaluate, "alignment": self.num_alignment}[split]


def class_names(settings: EmojiSettings) -> tuple[str, ...]:
    """Return the name of each class, by label: the categories in alphabetical order.

    Raises:
        DataError: the settings ask for no classes.
    """
    if not settings.classes:
        raise DataError("the emoji set has no classes under these settings: set `classes: true`")
    return tuple(sorted(set(settings.categories)))


def emoji_samples(settings: EmojiSettings, split: Split) -> Iterator[dict[str, Any]]:
    """Yield the split's samples in the img2dataset layout: `__key__`, and the members png, txt and json as bytes.

    With `settings.classes` there is cls too, the label in ASCII. The scenes of evaluate are those of the held-out
    concepts, and none of the others'. Every sample is a function of (seed, split, its number) alone.

    Raises:
        DataError: the packages of the extra `[emoji]` are not installed, or a category is not known.
    """
    names = class_names(settings) if settings.classes else ()
    held_out = split == "evaluate"
    pool: list[tuple[Concept, str]] = [
        (concept, style)
        for concept in concepts(categories=settings.categories, held_out_share=settings.held_out_share)
        for style in STYLES
        if concept.held_out == held_out and has_drawing(concept.code, style)
    ]
    for number in range(settings.num_samples(split)):
        rng = random.Random(f"{settings.seed}/{split}/{number}")
        scene = random_scene(rng, pool, single=settings.classes)
        caption, level = describe(rng, scene)
        picture = io.BytesIO()
        compose(scene, settings.resolution).save(picture, format="PNG")
        key = f"{SPLITS.index(split)}{number:08d}"
        record = {
            "key": key,
            "caption": caption,
            "caption_level": level,
            "width": settings.resolution,
            "height": settings.resolution,
            "original_width": settings.resolution,
            "original_height": settings.resolution,
            "status": "success",
            "style": scene.style,
            "background": scene.background,
            "concepts": [item.concept.name for item in scene.items],
            "codes": [item.concept.code for item in scene.items],
            "split": split,
            **STYLES[scene.style],
        }
        sample = {"__key__": key, "png": picture.getvalue(), "txt": caption.encode()}
        if settings.classes:
            name = scene.items[0].concept.category
            record |= {"label": names.index(name), "name": name}
            sample["cls"] = str(names.index(name)).encode()
        yield {**sample, "json": json.dumps(record, sort_keys=True).encode()}
