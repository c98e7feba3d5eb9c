"""Scenes of one to three emoji, and captions that tell only a part of them.

A caption that names one exact picture makes few-step sampling trivially easy: the conditional distribution is nearly a
point. So the caption gives the content at a level of detail drawn at random (name, keywords, kind, category, style
alone), and position, size, turn and background only sometimes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from fewstep.data.emoji.catalogue import Concept
from fewstep.data.emoji.drawing import draw_emoji

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (20, 20, 24),
    "grey": (160, 164, 170),
    "red": (214, 48, 49),
    "orange": (243, 146, 55),
    "yellow": (250, 214, 70),
    "green": (78, 170, 92),
    "blue": (66, 135, 220),
    "purple": (142, 85, 190),
    "pink": (246, 160, 190),
}

_TURNS = {0: "", 30: "tilted left", -30: "tilted right", 180: "upside down"}
_NUMBERS = {2: "two", 3: "three"}

# Two sizes, and places on a grid of an eighth of the side (a latent of the small teacher's VAE), most scenes one large
# emoji, most captions its name: what a teacher knows of a thing grows with how often it saw that drawing under its
# name. With sizes and places free to a pixel and half of the names withheld, 500,000 pictures taught colours and
# outlines and hardly any thing; 20,000 pictures of a large emoji with its name taught most of 234 drawings.
_GRID = 1 / 8
_LARGE = 15 / 16
_SMALL = 1 / 2


@dataclass(frozen=True)
class Placed:
    """One emoji in a scene: centre and size as shares of the picture's side, turn in degrees counter-clockwise."""

    concept: Concept
    x: float
    y: float
    size: float
    turn: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows, exactly."""

    items: tuple[Placed, ...]
    style: str
    background: str


def random_scene(rng: random.Random, pool: list[tuple[Concept, str]], *, single: bool = False) -> Scene:
    """Return a scene of one (80 %), two (16 %) or three (4 %) emoji of one style, drawn from (concept, style) pairs.

    With `single` it is always one.
    """
    concept, style = rng.choice(pool)
    background = "white" if rng.random() < 0.5 else rng.choice(list(BACKGROUNDS))
    count = 1 if single else rng.choices((1, 2, 3), (0.80, 0.16, 0.04))[0]
    chosen = [concept]
    for _ in range(count - 1):
        alike = [c for c, s in pool if s == style and c.kind == concept.kind]
        others = [c for c, s in pool if s == style]
        # Half of the time the same kind, so that "two birds" is a caption that many scenes answer.
        chosen.append(rng.choice(alike if rng.random() < 0.5 and len(alike) > 1 else others))
    if count == 1:
        return Scene((_single(rng, concept),), style, background)
    if count == 2:
        across = rng.random() < 0.7
        other = 0.5 + rng.choice((-1, 0, 1)) * _GRID
        places = [(0.25, other), (0.75, other)] if across else [(other, 0.25), (other, 0.75)]
    else:
        places = [(0.25, 0.25), (0.75, 0.25), (0.5, 0.75)]
    items = tuple(Placed(c, x, y, _SMALL, 0) for c, (x, y) in zip(chosen, places, strict=True))
    return Scene(items, style, background)


def _single(rng: random.Random, concept: Concept) -> Placed:
    turn = rng.choice((30, -30, 180)) if rng.random() < 0.1 else 0
    if rng.random() < 0.8:
        return Placed(concept, 0.5, 0.5, _LARGE, turn)
    room = round((1 - _SMALL) / _GRID)
    x, y = (_SMALL / 2 + rng.randint(0, room) * _GRID for _ in range(2))
    return Placed(concept, x, y, _SMALL, turn)


def compose(scene: Scene, resolution: int) -> Image.Image:
    """Return the scene as an RGB picture of `resolution` × `resolution` px."""
    # Drawn at twice the size and reduced once: placement stays exact to half a pixel and edges smooth.
    side = 2 * resolution
    picture = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    for item in scene.items:
        drawn = draw_emoji(item.concept.code, scene.style)
        size = round(item.size * side)
        drawn = drawn.resize((size, size), Image.Resampling.LANCZOS)
        if item.turn:
            drawn = drawn.rotate(item.turn, Image.Resampling.BICUBIC)
        picture.paste(drawn, (round(item.x * side - size / 2), round(item.y * side - size / 2)), drawn)
    return picture.resize((resolution, resolution), Image.Resampling.LANCZOS)


def describe(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """Return (caption, level of detail): level is name, keywords, kind, category or style."""
    if len(scene.items) == 1:
        return _describe_one(rng, scene)
    level = rng.choices(("name", "kind", "category", "style"), (0.55, 0.25, 0.12, 0.08))[0]
    concepts = [item.concept for item in scene.items]
    if level == "name":
        if len(concepts) == 2 and rng.random() < 0.6:
            first, second = scene.items
            relation = "to the left of" if second.x - first.x > second.y - first.y else "above"
            subject = f"{_article(concepts[0].name)} {relation} {_article(concepts[1].name)}"
        else:
            names = [_article(c.name) for c in concepts]
            subject = ", ".join(names[:-1]) + " and " + names[-1]
    elif level in ("kind", "category"):
        kinds = [(c.kind, c.kinds) if level == "kind" else (c.group, c.groups) for c in concepts]
        if len(set(kinds)) == 1:
            subject = f"{_NUMBERS[len(kinds)]} {kinds[0][1]}"
        else:
            subject = ", ".join(_article(k) for k, _ in kinds[:-1]) + " and " + _article(kinds[-1][0])
    else:
        subject = f"{_NUMBERS[len(concepts)]} emoji"
    return _with_details(rng, scene, subject, []), level


def _describe_one(rng: random.Random, scene: Scene) -> tuple[str, str]:
    item = scene.items[0]
    concept = item.concept
    level = rng.choices(("name", "keywords", "kind", "category", "style"), (0.65, 0.15, 0.10, 0.05, 0.05))[0]
    if level == "keywords" and not concept.keywords:
        level = "name"
    if level == "name":
        subject = _article(concept.name)
    elif level == "keywords":
        subject = ", ".join(rng.sample(concept.keywords, k=min(len(concept.keywords), rng.choice((1, 2)))))
    elif level == "kind":
        subject = _article(concept.kind)
    elif level == "category":
        subject = _article(concept.group)
    else:
        subject = "an emoji"
    details = []
    if item.turn and rng.random() < 0.8:
        details.append(_TURNS[item.turn])
    if rng.random() < 0.4:
        details.append("large" if item.size > 0.7 else "small")
    if item.size <= 0.7 and rng.random() < 0.4:
        details.append(_position(item))
    return _with_details(rng, scene, subject, [d for d in details if d]), level


def _with_details(rng: random.Random, scene: Scene, subject: str, details: list[str]) -> str:
    if rng.random() < 0.5:
        subject += f" on {scene.background}"
    # The style is left open in one caption of ten.
    if rng.random() < 0.9:
        details = [*details, scene.style]
    return ", ".join([subject, *details])


def _position(item: Placed) -> str:
    across = "left" if item.x < 0.45 else "right" if item.x > 0.55 else ""
    down = "top" if item.y < 0.45 else "bottom" if item.y > 0.55 else ""
    return " ".join(word for word in (down, across) if word) or "in the centre"


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
