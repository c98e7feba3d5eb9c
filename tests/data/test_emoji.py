"""The emoji set: stable, licensed, held out by concept, and with captions that many pictures answer."""

from __future__ import annotations

import io
import json
import random
from collections import Counter, defaultdict
from typing import Any

import pytest
from PIL import Image

from fewstep.data.emoji import STYLES, EmojiSettings, class_names, concepts, draw_emoji, emoji_samples
from fewstep.data.emoji.drawing import has_drawing
from fewstep.data.emoji.scenes import random_scene
from fewstep.data.pictures import decode_class_picture, decode_picture
from fewstep.errors import DataError

SETTINGS = EmojiSettings(resolution=32, num_train=400, num_evaluate=80, num_alignment=60)


@pytest.fixture(scope="module")
def train() -> list[dict[str, Any]]:
    return list(emoji_samples(SETTINGS, "train"))


@pytest.fixture(scope="module")
def evaluate() -> list[dict[str, Any]]:
    return list(emoji_samples(SETTINGS, "evaluate"))


def _records(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [json.loads(sample["json"]) for sample in samples]


def test_concepts_are_in_order_and_without_skin_tones() -> None:
    found = concepts()
    codes = [concept.code for concept in found]
    assert codes == sorted(codes)
    assert len(codes) == len(set(codes)) > 500
    for concept in found:
        assert not any(0x1F3FB <= int(part, 16) <= 0x1F3FF for part in concept.code.split("-"))
        assert "skin tone" not in concept.name
        assert concept.name == concept.name.strip().lower() != ""
        assert ":" not in concept.name + concept.kind + concept.group
        assert concept.name not in concept.keywords


def test_known_concepts_say_what_they_are() -> None:
    by_code = {concept.code: concept for concept in concepts()}
    apple, bird = by_code["1f34e"], by_code["1f426"]
    assert (apple.name, apple.kind, apple.kinds, apple.group) == ("red apple", "fruit", "fruits", "food")
    assert (bird.kind, bird.kinds, bird.groups) == ("bird", "birds", "living things")


def test_one_concept_in_ten_is_held_out_by_its_own_hash() -> None:
    found = concepts()
    held_out = {concept.code for concept in found if concept.held_out}
    assert 0.07 < len(held_out) / len(found) < 0.13
    # Fewer categories, and a larger share, never bring a held-out concept back into training.
    animals = concepts(categories=("animals-and-nature",))
    assert {c.code for c in animals if c.held_out} == held_out & {c.code for c in animals}
    assert held_out <= {c.code for c in concepts(held_out_share=0.3) if c.held_out}


def test_no_held_out_concept_is_in_a_training_picture(
    train: list[dict[str, Any]], evaluate: list[dict[str, Any]]
) -> None:
    alignment = list(emoji_samples(SETTINGS, "alignment"))
    trained = {code for record in _records([*train, *alignment]) for code in record["codes"]}
    judged = {code for record in _records(evaluate) for code in record["codes"]}
    held_out = {concept.code for concept in concepts() if concept.held_out}
    assert trained
    assert not trained & held_out
    assert judged <= held_out
    keys = [sample["__key__"] for sample in [*train, *evaluate, *alignment]]
    assert len(keys) == len(set(keys)) == 400 + 80 + 60


def test_samples_are_a_function_of_seed_split_and_number(train: list[dict[str, Any]]) -> None:
    shorter = list(emoji_samples(SETTINGS.model_copy(update={"num_train": 5}), "train"))
    assert shorter == train[:5]
    other = list(emoji_samples(SETTINGS.model_copy(update={"num_train": 5, "seed": 1}), "train"))
    assert all(a["png"] != b["png"] for a, b in zip(other, shorter, strict=True))


def test_every_sample_has_a_caption_a_licence_and_a_source(train: list[dict[str, Any]]) -> None:
    for sample, record in zip(train, _records(train), strict=True):
        assert sample["txt"].decode() == record["caption"] != ""
        assert record["license"] == STYLES[record["style"]]["license"]
        assert record["source"] == STYLES[record["style"]]["source"] != ""
        assert record["key"] == sample["__key__"]
        assert (record["width"], record["height"], record["status"]) == (32, 32, "success")
        with Image.open(io.BytesIO(sample["png"])) as picture:
            assert (picture.size, picture.mode) == ((32, 32), "RGB")
        pixels = decode_picture(sample, resolution=32)["pixels"]
        assert pixels.shape == (3, 32, 32)
        assert float(pixels.float().std()) > 2, "nothing is drawn"


def test_both_styles_and_all_levels_of_captions_appear(train: list[dict[str, Any]]) -> None:
    records = _records(train)
    styles = Counter(record["style"] for record in records)
    levels = Counter(record["caption_level"] for record in records)
    sizes = Counter(len(record["codes"]) for record in records)
    assert set(styles) == set(STYLES)
    assert min(styles.values()) > 120
    assert set(levels) == {"name", "keywords", "kind", "category", "style"}
    assert min(levels.values()) >= 15
    assert max(levels.values()) < 280
    assert sizes[1] > sizes[2] > sizes[3] > 5
    # The style is said in about nine captions of ten, the background in half.
    assert 0.8 < sum(record["style"] in record["caption"] for record in records) / 400 < 0.97
    backgrounds = sum(f" on {record['background']}" in record["caption"] for record in records)
    assert 0.4 < backgrounds / 400 < 0.6


def test_captions_have_several_answers() -> None:
    # Of a few things, so that the same caption comes often.
    settings = SETTINGS.model_copy(update={"categories": ("food-and-drink",), "num_train": 1200})
    samples = list(emoji_samples(settings, "train"))
    answers: dict[str, set[bytes]] = defaultdict(set)
    concepts_of: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for sample, record in zip(samples, _records(samples), strict=True):
        answers[record["caption"]].add(sample["png"])
        concepts_of[record["caption"]].add(tuple(record["codes"]))
    shared = [caption for caption, pictures in answers.items() if len(pictures) > 1]
    assert len(shared) >= 40
    # Not only another background or place, but another thing: by keyword, kind, category or style alone.
    assert sum(len(concepts_of[caption]) > 1 for caption in shared) >= 20


def test_emoji_keep_to_a_grid_of_latents() -> None:
    """A convolution sees the same drawing at every place: what a small teacher learns its things from."""
    rng = random.Random(0)
    pool = [(concept, "twemoji") for concept in concepts(categories=("food-and-drink",))]
    for _ in range(300):
        for item in random_scene(rng, pool).items:
            left, top = (centre - item.size / 2 for centre in (item.x, item.y))
            assert 0 <= left <= 1 - item.size
            assert 0 <= top <= 1 - item.size
            if item.size <= 0.5:
                assert (left * 8, top * 8, item.size * 8) == (round(left * 8), round(top * 8), 4)
            else:
                assert (left, top) == (1 / 32, 1 / 32)


def test_drawings_fill_their_square_in_both_styles() -> None:
    for style in STYLES:
        drawn = draw_emoji("1f34e", style)
        assert (drawn.size, drawn.mode) == ((144, 144), "RGBA")
        left, top, right, bottom = drawn.getbbox() or (0, 0, 0, 0)
        assert max(right - left, bottom - top) >= 142
    assert draw_emoji("1f34e", "twemoji").tobytes() != draw_emoji("1f34e", "openmoji").tobytes()


def test_most_concepts_are_drawn_in_both_styles() -> None:
    drawn = Counter(style for concept in concepts() for style in STYLES if has_drawing(concept.code, style))
    assert min(drawn.values()) > 0.95 * len(concepts())


def test_without_classes_no_sample_has_one(train: list[dict[str, Any]]) -> None:
    assert all(set(sample) == {"__key__", "png", "txt", "json"} for sample in train)
    assert all(not {"label", "name"} & set(record) for record in _records(train))


@pytest.mark.parametrize("split", ["train", "evaluate", "alignment"])
def test_with_classes_every_scene_is_one_emoji_with_its_category(split: Any) -> None:
    chosen = ("objects", "food-and-drink", "animals-and-nature", "food-and-drink")
    settings = SETTINGS.model_copy(update={"classes": True, "categories": chosen, "num_train": 120})
    names = class_names(settings)
    assert names == ("animals-and-nature", "food-and-drink", "objects")
    category_of = {concept.code: concept.category for concept in concepts()}
    labels = Counter[int]()
    for sample in emoji_samples(settings, split):
        record = json.loads(sample["json"])
        label = decode_class_picture(sample, resolution=32, channels=3, num_classes=3)["label"]
        (code,) = record["codes"]
        assert names[int(label)] == category_of[code] == record["name"]
        assert sample["cls"].decode() == str(record["label"]) == str(int(label))
        assert decode_picture(sample, resolution=32)["caption"] == record["caption"]
        labels[int(label)] += 1
    assert set(labels) == {0, 1, 2}
    assert min(labels.values()) >= 5


def test_faults_are_said_in_words() -> None:
    with pytest.raises(DataError, match="style 'noto' is unknown; there are twemoji, openmoji"):
        draw_emoji("1f34e", "noto")
    with pytest.raises(DataError, match="style 'twemoji' has no drawing of ffff"):
        draw_emoji("ffff", "twemoji")
    with pytest.raises(DataError, match=r"no emoji is in the categories \['cars'\]; known ones are"):
        concepts(categories=("cars",))
    with pytest.raises(DataError, match=r"no emoji is in the categories \['flags'\]; known ones are"):
        concepts(categories=("objects", "flags"))
    with pytest.raises(DataError, match="name at least one of"):
        concepts(categories=())
    with pytest.raises(DataError, match="has no classes under these settings: set `classes: true`"):
        class_names(SETTINGS)
