"""The classifier on scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.evaluate.class_pictures import digits, fitted_classifier, new_classifier, real_digits, training_digits

from fewstep.errors import DataError, ModelError
from fewstep.evaluate.classes.classifier import ClassifierSettings, PictureClassifier


def test_it_learns_and_its_outputs_have_their_form() -> None:
    classifier, (pixels, labels) = fitted_classifier(), real_digits()
    assert classifier.accuracy(pixels, labels) > 0.95
    judged = classifier.judge(pixels)
    assert judged.features.shape == (450, 128)
    assert judged.features.dtype == torch.float32
    assert bool((judged.features >= 0).all())
    assert judged.probabilities.shape == (450, 10)
    torch.testing.assert_close(judged.probabilities.sum(1), torch.ones(450, dtype=torch.float64))
    assert torch.equal(classifier.features(pixels), judged.features)
    assert torch.equal(classifier.probabilities(pixels), judged.probabilities)
    together, alone = judged.features[7:8], classifier.features(pixels[7:8])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5, msg="a picture's features are its own")


def test_same_seed_same_classifier_and_the_callers_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = (new_classifier(num_updates=3).fit(*training_digits()) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != fitted_classifier().fingerprint


def test_saved_and_loaded(tmp_path: Path) -> None:
    fitted_classifier().save(tmp_path / "folder")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        "classifier.json",
        "classifier.safetensors",
    ]
    loaded = PictureClassifier.load(tmp_path / "folder", num_threads=1)
    assert loaded.fingerprint == fitted_classifier().fingerprint
    assert loaded.settings == fitted_classifier().settings
    pixels = real_digits()[0][:20]
    assert torch.equal(loaded.features(pixels), fitted_classifier().features(pixels))
    (tmp_path / "folder" / "classifier.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot be read"):
        PictureClassifier.load(tmp_path / "folder")
    with pytest.raises(ModelError, match="cannot be read"):
        PictureClassifier.load(tmp_path / "nowhere")


@pytest.mark.parametrize(("channels", "resolution"), [(3, 32), (1, 28), (2, 5)])
def test_other_sizes(channels: int, resolution: int) -> None:
    pixels = torch.randint(0, 256, (6, channels, resolution, resolution), dtype=torch.uint8)
    settings = ClassifierSettings(num_updates=2)
    classifier = PictureClassifier(channels=channels, resolution=resolution, num_classes=2, settings=settings)
    assert classifier.fit(pixels, torch.arange(6) % 2).features(pixels).shape == (6, 128)


def test_what_it_refuses() -> None:
    classifier, (pixels, labels) = fitted_classifier(), digits()
    with pytest.raises(DataError, match=r"uint8 \(N, 1, 8, 8\) with N ≥ 1, but torch.uint8 \(5, 1, 8, 7\)"):
        classifier.features(pixels[:5, :, :, :7])
    with pytest.raises(DataError, match=r"\(5, 3, 8, 8\)"):
        classifier.features(pixels[:5].expand(-1, 3, -1, -1))
    with pytest.raises(DataError, match="float32"):
        classifier.probabilities(pixels[:5].float())
    with pytest.raises(DataError, match=r"labels from 0 to 10 came, but the classifier has the classes 0 … 9"):
        classifier.accuracy(pixels[:2], torch.tensor([0, 10]))
    with pytest.raises(DataError, match="labels must be int64"):
        classifier.accuracy(pixels[:2], torch.tensor([0.0, 1.0]))
    with pytest.raises(DataError, match="one label a picture"):
        new_classifier().fit(pixels[:5], labels[:4])
    with pytest.raises(DataError, match="at least 2"):
        new_classifier().fit(pixels[:1], labels[:1])
    with pytest.raises(ModelError, match="no weights yet"):
        new_classifier().features(pixels[:5])
    with pytest.raises(ModelError, match="resolution=2"):
        PictureClassifier(channels=1, resolution=2, num_classes=10)
