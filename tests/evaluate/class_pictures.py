"""Digits of scikit-learn as pictures with classes, a classifier of them, rows with chosen figures, fake samplers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from fewstep.evaluate.classes.classifier import ClassifierSettings, PictureClassifier
from fewstep.evaluate.classes.jackknife import Measured
from fewstep.evaluate.classes.schema import ClassResult, ClassRowSpec

NUM_CLASSES = 10


@cache
def digits() -> tuple[Tensor, Tensor]:
    """All 1797 digits, uint8 (N, 1, 8, 8), and their labels; in an order that mixes the writers."""
    pictures, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(pictures).mul(255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    return pixels[order], torch.from_numpy(labels).long()[order]


def training_digits() -> tuple[Tensor, Tensor]:
    return digits()[0][:900], digits()[1][:900]


def real_digits() -> tuple[Tensor, Tensor]:
    """Those that generated ones are compared with; neither the classifier nor the samplers use them."""
    return digits()[0][900:1350], digits()[1][900:1350]


def new_classifier(num_updates: int = 200) -> PictureClassifier:
    settings = ClassifierSettings(num_updates=num_updates, batch_size=64)
    return PictureClassifier(channels=1, resolution=8, num_classes=NUM_CLASSES, settings=settings, num_threads=1)


@cache
def fitted_classifier() -> PictureClassifier:
    return new_classifier().fit(*training_digits())


def real_pictures_of(labels: Tensor, seeds: Sequence[int]) -> Tensor:
    """A real picture of each asked class, the same for the same seed; from the digits that nothing else uses."""
    pixels, classes = digits()[0][1350:], digits()[1][1350:]
    chosen = []
    for label, seed in zip(labels.tolist(), seeds, strict=True):
        of_class = (classes == label).nonzero()[:, 0]
        chosen.append(pixels[of_class[seed % len(of_class)]])
    return torch.stack(chosen)


def blurred(pixels: Tensor, share: float) -> Tensor:
    soft = functional.avg_pool2d(functional.pad(pixels.float(), (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    return torch.lerp(pixels.float(), soft, share).round().to(torch.uint8)


#: How much the fake samplers blur, by method; fewer steps blur more.
BLUR = {
    "teacher": 0.0,
    "student": 0.15,
    "student_stochastic": 0.2,
    "student_single_w": 0.15,
    "dpmpp": 0.6,
    "ddim": 1.0,
}


def fake_sampler(spec: ClassRowSpec, labels: Tensor, seeds: Sequence[int]) -> Tensor:
    """Real pictures, blurred by method and steps; with a large w only ever one picture of one class.

    The deterministic student is perfect from 4 steps on: it returns the teacher's pictures.
    """
    if spec.w >= 100:
        return real_pictures_of(torch.full_like(labels, 3), [0] * len(seeds))
    perfect = spec.method in ("teacher", "student") and spec.num_inference_steps >= 4
    share = 0.0 if perfect else BLUR[spec.method] / spec.num_inference_steps**0.5
    return blurred(real_pictures_of(labels, seeds), share)


def figure(value: float | None, spread: float = 0.01) -> Measured:
    """A figure of which the groups differ by `spread` of it."""
    if value is None:
        return Measured(value=None, interval=None)
    left_out = tuple(value * (1 + spread * (group - 4.5) / 4.5 / 10) for group in range(10))
    return Measured(value=value, interval=(value * (1 - spread), value * (1 + spread)), left_out=left_out)


def row(spec: ClassRowSpec, fd: float | None, *, score: float | None = 8.0, spread: float = 0.01) -> ClassResult:
    """A row with a chosen Fréchet distance and score."""
    return ClassResult(
        method=spec.method,
        num_inference_steps=spec.num_inference_steps,
        w=spec.w,
        network_evaluations=spec.network_evaluations,
        fd_classifier=figure(fd, spread),
        classifier_score=figure(score, spread),
        accuracy=figure(0.9),
        precision=figure(0.8),
        recall=figure(0.7),
        seconds_per_picture=Measured(value=0.01, interval=None),
        num_pictures=1000,
        num_manifold_pictures=1000,
    )
