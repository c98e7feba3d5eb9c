"""Training the VAE that a latent teacher lives in."""

from __future__ import annotations

import torch
from diffusers.models import AutoencoderKL
from torch import Tensor, nn

from fewstep.diffusion.random import RowRandom
from fewstep.distill.objective import Batch


class AutoencoderObjective:
    """Reconstruction of a picture from its latents: L1 on pixels and on their differences, and a small KL term.

    The differences of neighbouring pixels keep edges sharp where L1 alone leaves them soft; no adversary is needed for
    flat drawings. Rombach et al. 2022 (§3.1) weigh the KL term as little, so that latents stay near a unit scale
    without losing detail.

    Args:
        vae: the network; trained in place.
        kl_weight: weight of the KL divergence per latent element.
        edge_weight: weight of the L1 distance of pixel differences.
    """

    def __init__(self, vae: AutoencoderKL, *, kl_weight: float = 1e-4, edge_weight: float = 1.0) -> None:
        self.network: nn.Module = _Reconstruction(vae)
        self._latent_channels: int = vae.config["latent_channels"]
        self._pixels_per_latent = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.kl_weight = kl_weight
        self.edge_weight = edge_weight

    def loss(self, network: nn.Module, batch: Batch, random: RowRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss over `batch["pixels"]`, uint8 (B, 3, H, W), and its parts."""
        pixels = batch["pixels"].float() / 127.5 - 1
        height, width = (side // self._pixels_per_latent for side in pixels.shape[2:])
        reconstruction, mean, logvar = network(pixels, random.normal(self._latent_channels, height, width))
        reconstruction, mean, logvar = reconstruction.float(), mean.float(), logvar.float()
        l1 = (reconstruction - pixels).abs().mean()
        edges = (_difference(reconstruction, -1) - _difference(pixels, -1)).abs().mean()
        edges = edges + (_difference(reconstruction, -2) - _difference(pixels, -2)).abs().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        figures = {
            "pixel_mse": (reconstruction - pixels).square().mean().detach(),
            "pixel_l1": l1.detach(),
            "kl": kl.detach(),
        }
        return l1 + self.edge_weight * edges + self.kl_weight * kl, figures


class _Reconstruction(nn.Module):
    """The VAE as one forward pass, which data-parallel wrappers need, with its noise given."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.vae.decode(latents).sample, posterior.mean, posterior.logvar


def _difference(x: Tensor, dim: int) -> Tensor:
    return torch.diff(x, dim=dim)
