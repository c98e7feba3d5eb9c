"""A small picture classifier that is trained here: its features, class probabilities and accuracy carry the figures.

The paper's Table 1 uses Inception's features and probabilities. For pictures of 8 × 8 or 32 × 32 px that network is the
wrong one and its weights need a download, so the figures here are named after this classifier (`fd_classifier`,
`classifier_score`): they rank methods on one data set under one trained classifier and are neither FID nor IS. The
report carries the classifier's `fingerprint`: figures of different fingerprints must not be compared.

The real pictures that generated ones are measured against should be such that the classifier was not trained on:
a network's features of its own training pictures are more certain than those of any new picture.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import DataError, ModelError
from fewstep.evaluate.features import limited_threads

#: Width of the features: few enough that 1000s of pictures estimate their covariance well.
FEATURE_DIM = 128
_WEIGHTS_FILE, _CONFIG_FILE = "classifier.safetensors", "classifier.json"
_WIDTHS = (16, 32, 64, 128)
#: Pooled at this side: the last map still tells left from right, and the network ends within a few layers.
_SMALLEST_SIDE_PX = 4


class ClassifierSettings(BaseModel):
    """How the classifier is trained.

    Measured with the defaults on Fashion-MNIST, padded to 32 × 32: 92.2 % of the 10 000 test pictures after 110 s of
    one CPU core (all 60 000 training pictures).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_updates: int = Field(default=1400, ge=1, description="optimiser steps; 1400 are 3 passes over 60 000 pictures")
    batch_size: int = Field(default=128, ge=2, description="pictures a step")
    learning_rate: float = Field(default=3e-3, gt=0, description="AdamW's highest, reached after a fifth of the steps")
    weight_decay: float = Field(default=0.05, ge=0, description="AdamW's")
    seed: int = Field(default=0, ge=0, description="of the network's start and the order of the pictures")


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str = "picture_classifier"
    channels: int
    resolution: int
    num_classes: int
    settings: ClassifierSettings


@dataclass(frozen=True)
class Judged:
    """What the classifier says of N pictures.

    Attributes:
        features: (N, 128) float32 on the CPU: the input of its last layer, each ≥ 0.
        probabilities: of the classes, (N, num_classes) float64 on the CPU.
    """

    features: Tensor
    probabilities: Tensor


class _Network(nn.Module):
    """Convolutions of 3 × 3 that halve the side down to 4 px, a mean over the map, one linear layer."""

    pixel_mean: Tensor
    pixel_scale: Tensor

    def __init__(self, channels: int, resolution: int, num_classes: int) -> None:
        super().__init__()
        layers, width, side, halvings = [*_block(channels, _WIDTHS[0], stride=1)], _WIDTHS[0], resolution, 0
        while side > _SMALLEST_SIDE_PX:
            halvings += 1
            wider = _WIDTHS[min(halvings, len(_WIDTHS) - 1)]
            layers += _block(width, wider, stride=2)
            width, side = wider, (side + 1) // 2
        layers += _block(width, FEATURE_DIM, stride=1)
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(FEATURE_DIM, num_classes)
        self.register_buffer("pixel_mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("pixel_scale", torch.ones(1, channels, 1, 1))

    def features(self, pixels: Tensor) -> Tensor:
        standard = (pixels.float() - self.pixel_mean) / self.pixel_scale
        features: Tensor = self.body(standard.contiguous(memory_format=torch.channels_last))
        return features


def _block(channels_in: int, channels_out: int, *, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]


class PictureClassifier:
    """The classifier: fit once (or load), then judge pictures.

    Args:
        channels: of the pictures, 1 or 3.
        resolution: side of the square pictures in pixels, at least 4.
        num_classes: labels are 0 … num_classes − 1.
        settings: how it is trained.
        device: where the network runs.
        batch_size: pictures a forward pass when judging.
        num_threads: CPU threads to use while it runs; None leaves torch's setting.

    Raises:
        ModelError: a size that it cannot be built for.
    """

    def __init__(
        self,
        *,
        channels: int,
        resolution: int,
        num_classes: int,
        settings: ClassifierSettings | None = None,
        device: torch.device | str = "cpu",
        batch_size: int = 500,
        num_threads: int | None = None,
    ) -> None:
        if channels < 1 or resolution < _SMALLEST_SIDE_PX or num_classes < 2:
            raise ModelError(
                f"a classifier of channels={channels}, resolution={resolution}, num_classes={num_classes} cannot be "
                f"built: it needs a channel, a side of {_SMALLEST_SIDE_PX} px and two classes at least"
            )
        self.channels, self.resolution, self.num_classes = channels, resolution, num_classes
        self.settings = settings or ClassifierSettings()
        self.device, self.batch_size, self.num_threads = torch.device(device), batch_size, num_threads
        self._network: _Network | None = None

    def fit(self, pixels: Tensor, labels: Tensor) -> PictureClassifier:
        """Train and return self. On a CPU, same pictures, settings and number of threads: same classifier.

        Args:
            pixels: uint8, (N, channels, resolution, resolution).
            labels: the pictures' classes, (N,) int64.

        Raises:
            DataError: pictures or labels that it was not built for, or fewer than two pictures.
        """
        self._check(pixels, labels)
        if pixels.shape[0] < 2:
            raise DataError(f"{pixels.shape[0]} picture came to train the classifier; it needs at least 2")
        with limited_threads(self.num_threads):
            self._network = self._train(pixels, labels)
        return self

    @torch.no_grad()
    def judge(self, pixels: Tensor) -> Judged:
        """Return features and class probabilities of pictures, both from one forward pass.

        Args:
            pixels: uint8, (N, channels, resolution, resolution).

        Raises:
            ModelError: the classifier was neither fitted nor loaded.
            DataError: pictures of another size, number of channels or type.
        """
        self._check(pixels)
        network = self._fitted()
        features, probabilities = [], []
        with limited_threads(self.num_threads):
            for batch in pixels.split(self.batch_size):
                rows = network.features(batch.to(self.device))
                features.append(rows.cpu())
                # float64: the score takes logarithms of probabilities that float32 rounds to 0 or 1.
                probabilities.append(functional.softmax(network.head(rows).cpu().double(), dim=1))
        return Judged(torch.cat(features), torch.cat(probabilities))

    def features(self, pixels: Tensor) -> Tensor:
        """Return the features of pictures, (N, 128) float32; otherwise as `judge`."""
        return self.judge(pixels).features

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Return the class probabilities of pictures, (N, num_classes) float64; otherwise as `judge`."""
        return self.judge(pixels).probabilities

    def accuracy(self, pixels: Tensor, labels: Tensor) -> float:
        """Return the share of pictures whose most probable class is their label; otherwise as `judge`."""
        self._check(pixels, labels)
        return float((self.probabilities(pixels).argmax(1) == labels.cpu()).double().mean())

    def check_labels(self, labels: Tensor) -> None:
        """Check that `labels` are classes of this classifier.

        Raises:
            DataError: not (N,) int64 with N ≥ 1, or a label out of range.
        """
        if labels.dtype != torch.int64 or labels.ndim != 1 or labels.shape[0] < 1:
            raise DataError(f"labels must be int64 (N,) with N ≥ 1, but {labels.dtype} {tuple(labels.shape)} came")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.num_classes:
            raise DataError(
                f"labels from {low} to {high} came, but the classifier has the classes 0 … {self.num_classes - 1}: "
                "give it the data set's own labels, or build it with that many classes"
            )

    @property
    def fingerprint(self) -> str:
        """First 12 hex digits of the SHA-256 of the weights: figures compare under one fingerprint only.

        Raises:
            ModelError: the classifier was neither fitted nor loaded.
        """
        digest = hashlib.sha256()
        for name, value in sorted(self._fitted().state_dict().items()):
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write classifier.safetensors and classifier.json into a folder, made if need be.

        Raises:
            ModelError: the classifier was neither fitted nor loaded.
        """
        state = {name: value.cpu().contiguous() for name, value in self._fitted().state_dict().items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(state, Path(folder) / _WEIGHTS_FILE)
        config = _Config(
            channels=self.channels, resolution=self.resolution, num_classes=self.num_classes, settings=self.settings
        )
        (Path(folder) / _CONFIG_FILE).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 500,
        num_threads: int | None = None,
    ) -> PictureClassifier:
        """Return the classifier that `save` wrote.

        Raises:
            ModelError: the folder is missing or holds no such classifier.
        """
        try:
            config = _Config.model_validate_json((Path(folder) / _CONFIG_FILE).read_bytes())
            classifier = cls(
                channels=config.channels,
                resolution=config.resolution,
                num_classes=config.num_classes,
                settings=config.settings,
                device=device,
                batch_size=batch_size,
                num_threads=num_threads,
            )
            network = _Network(config.channels, config.resolution, config.num_classes)
            network.load_state_dict(load_file(Path(folder) / _WEIGHTS_FILE))
        except (OSError, SafetensorError, RuntimeError, ValidationError) as error:
            raise ModelError(
                f"the picture classifier {os.fspath(folder)} cannot be read: {error}; fit and save it again"
            ) from error
        classifier._network = _frozen(network, classifier.device)
        return classifier

    def _fitted(self) -> _Network:
        if self._network is None:
            raise ModelError("the classifier has no weights yet: call fit(pixels, labels), or load(folder)")
        return self._network

    def _check(self, pixels: Tensor, labels: Tensor | None = None) -> None:
        shape = (self.channels, self.resolution, self.resolution)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or tuple(pixels.shape[1:]) != shape or pixels.shape[0] < 1:
            raise DataError(
                f"pictures for this classifier must be uint8 (N, {', '.join(map(str, shape))}) with N ≥ 1, "
                f"but {pixels.dtype} {tuple(pixels.shape)} came: bring them to that size, or fit another classifier"
            )
        if labels is not None:
            self.check_labels(labels)
            if labels.shape[0] != pixels.shape[0]:
                raise DataError(f"{pixels.shape[0]} pictures and {labels.shape[0]} labels came: one label a picture")

    def _train(self, pixels: Tensor, labels: Tensor) -> _Network:
        settings, count = self.settings, pixels.shape[0]
        batch_size = min(settings.batch_size, count)
        # The start is drawn from the global generator; the fork leaves the caller's as it was.
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(settings.seed)
            network = _Network(self.channels, self.resolution, self.num_classes)
            mean, scale = _pixel_statistics(pixels)
            network.pixel_mean.copy_(mean.view_as(network.pixel_mean))
            network.pixel_scale.copy_(scale.view_as(network.pixel_scale))
            network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            optimizer = torch.optim.AdamW(
                network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
            )
            rate = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: _one_cycle(step / settings.num_updates, warm_up=0.2)
            )
            order = torch.randperm(count)
            for _ in range(settings.num_updates):
                if order.shape[0] < batch_size:
                    order = torch.randperm(count)
                rows, order = order[:batch_size], order[batch_size:]
                logits = network.head(network.features(pixels[rows].to(self.device)))
                loss = functional.cross_entropy(logits, labels[rows].to(self.device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                rate.step()
        return _frozen(network, self.device)


def _pixel_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, (channels,); in pieces: as floats a set is four times it."""
    count = pixels.shape[0] * pixels.shape[2] * pixels.shape[3]
    mean = sum(part.double().sum((0, 2, 3)) for part in pixels.split(1000)) / count
    square = sum(part.double().square().sum((0, 2, 3)) for part in pixels.split(1000)) / count
    # + 1: a channel of one value only must not be divided by 0.
    return mean, (square - mean.square()).clamp_min(0).sqrt() + 1.0


def _frozen(network: _Network, device: torch.device) -> _Network:
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval().requires_grad_(False)


def _one_cycle(share: float, *, warm_up: float) -> float:
    """Return the learning rate's factor: up in a line, then down in a line, never quite 0."""
    return max(min(share / warm_up, (1 - share) / (1 - warm_up)), 0.01)
