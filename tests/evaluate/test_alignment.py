"""The scorer on drawings whose captions say colour and shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fewstep.errors import DataError, ModelError
from fewstep.evaluate.alignment import AlignmentScorer, AlignmentSettings, MiniLMText
from fewstep.evaluate.features import Lite0Features

COLOURS = {"red": "#d22", "green": "#2a2", "blue": "#22d", "yellow": "#dd2", "black": "#111"}
SHAPES = ("circle", "square", "triangle")
SETTINGS = AlignmentSettings(dim=32, epochs=30, batch_size=60)


def drawing(colour: str, shape: str, generator: torch.Generator) -> Tensor:
    left, top, side = (
        int(torch.randint(low, high, (), generator=generator)) for low, high in ((2, 14), (2, 14), (14, 30))
    )
    picture = Image.new("RGB", (48, 48), "white")
    draw, box = ImageDraw.Draw(picture), (left, top, left + side, top + side)
    if shape == "circle":
        draw.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        draw.rectangle(box, fill=COLOURS[colour])
    else:
        draw.polygon([(left, top + side), (left + side, top + side), (left + side // 2, top)], fill=COLOURS[colour])
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.view(48, 48, 3).permute(2, 0, 1).contiguous()


def drawings(each: int, *, seed: int) -> tuple[Tensor, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES for _ in range(each)]
    pictures = torch.stack([drawing(colour, shape, generator) for colour, shape in pairs])
    return pictures, [f"a {colour} {shape}" for colour, shape in pairs]


@pytest.fixture(scope="module")
def text() -> MiniLMText:
    return MiniLMText(num_threads=1)


@pytest.fixture(scope="module")
def fitted(lite0: Lite0Features, text: MiniLMText) -> AlignmentScorer:
    return AlignmentScorer(SETTINGS, image_features=lite0, text_embeddings=text).fit(*drawings(8, seed=0))


def test_sentence_embeddings_know_meaning(text: MiniLMText) -> None:
    apple, fruit, car, again = text(["a red apple", "an apple fruit", "a police car", "a red apple"])
    assert apple @ fruit > 0.7 > 0.3 > apple @ car
    assert torch.equal(apple, again)
    torch.testing.assert_close(apple.norm(), torch.tensor(1.0))


def test_matched_pairs_score_above_mismatched_ones(fitted: AlignmentScorer) -> None:
    pictures, captions = drawings(3, seed=1)
    features = fitted.image_features(pictures)
    matched = fitted.score_features(features, captions)
    wrong_colour = fitted.score_features(features, [caption.replace(*_swap(caption)) for caption in captions])
    assert matched.abs().max() <= 1 + 1e-5
    assert (matched > wrong_colour).float().mean() > 0.9
    assert matched.mean() > wrong_colour.mean() + 0.2


def test_training_is_repeatable_and_leaves_the_random_state_alone(fitted: AlignmentScorer) -> None:
    pictures, captions = drawings(2, seed=2)
    features = fitted.image_features(pictures)
    settings = AlignmentSettings(dim=16, epochs=2, batch_size=30)
    torch.manual_seed(5)
    scores = []
    for _ in range(2):
        scorer = AlignmentScorer(settings, image_features=fitted.image_features, text_embeddings=fitted.text_embeddings)
        scores.append(scorer.fit_features(features, captions).score_features(features, captions))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(*scores)
    assert torch.equal(drawn, torch.rand(1))


def test_saved_scorer_scores_the_same(fitted: AlignmentScorer, tmp_path: Path) -> None:
    path = tmp_path / "scorer.safetensors"
    fitted.save(path)
    loaded = AlignmentScorer.load(path, image_features=fitted.image_features, text_embeddings=fitted.text_embeddings)
    pictures, captions = drawings(1, seed=3)
    assert torch.equal(fitted.score(pictures, captions), loaded.score(pictures, captions))
    assert loaded.settings == SETTINGS


def test_files_that_hold_no_scorer(fitted: AlignmentScorer, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shared = {"image_features": fitted.image_features, "text_embeddings": fitted.text_embeddings}
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(ModelError, match=r"other\.safetensors is not an alignment_lite0_minilm scorer"):
        AlignmentScorer.load(other, **shared)
    broken = tmp_path / "broken.safetensors"
    fitted.save(broken)
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        AlignmentScorer.load(broken, **shared)
    with pytest.raises(ModelError, match="cannot be read"):
        AlignmentScorer.load(tmp_path / "nothing.safetensors", **shared)


def test_what_cannot_be_learned_or_scored(fitted: AlignmentScorer) -> None:
    pictures, captions = drawings(1, seed=4)
    fresh = AlignmentScorer(SETTINGS, image_features=fitted.image_features, text_embeddings=fitted.text_embeddings)
    with pytest.raises(ModelError, match="no weights yet"):
        fresh.score(pictures[:1], captions[:1])
    with pytest.raises(DataError, match="15 pictures and 14 captions"):
        fresh.fit(pictures, captions[:-1])
    with pytest.raises(DataError, match="captions are equal"):
        fresh.fit_features(torch.zeros(3, 1280), ["a"] * 3)
    with pytest.raises(DataError, match="empty one"):
        fitted.score(pictures[:2], ["a cat", " "])


def _swap(caption: str) -> tuple[str, str]:
    colour = caption.split()[1]
    return colour, "blue" if colour != "blue" else "yellow"
