"""Points of the plane in classes: a world in which guidance is known exactly, with a network for it of 40,000 weights.

Each class is half a cloud of its own on a circle and half a cloud in the middle that all classes share. Guidance pulls
away from what classes have in common: with w the share of the middle goes, class by class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from fewstep.diffusion import NoiseSchedule, guide
from fewstep.diffusion.prediction import PredictionType
from fewstep.diffusion.samplers import Model
from fewstep.models.denoiser import Condition, Denoiser

NUM_CLASSES = 3
_RADIUS, _STD = 1.5, 0.25


def _centres() -> Tensor:
    angle = torch.arange(NUM_CLASSES) * (2 * math.pi / NUM_CLASSES)
    own = _RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)
    return torch.stack([own, torch.zeros_like(own)], dim=1)


@dataclass(frozen=True)
class Plane:
    """The distribution, and its exact denoiser.

    Attributes:
        centres: of the clouds, (classes, 2, 2); the standard deviation of each is 0.25.
    """

    centres: Tensor

    @classmethod
    def make(cls) -> Plane:
        """Return the distribution of every run."""
        return cls(_centres())

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Return a point of each class, (B, 2)."""
        cloud = torch.randint(0, 2, labels.shape, generator=generator)
        return self.centres[labels, cloud] + _STD * torch.randn(*labels.shape, 2, generator=generator)

    def own_class(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the probability that a point is of its label's class, (B,): 1/3 in the middle, 1 on the circle."""
        squares = (x[:, None, None] - self.centres).square().sum(-1) / (2 * _STD**2)
        return (-squares.flatten(1)).softmax(1).view(squares.shape).sum(-1).gather(1, labels[:, None])[:, 0]

    def velocity(self, z: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """Return E[v | z_t], (B, 2); alpha and sigma (B, 1). Label 3 is "no class": the mixture of all."""
        clouds = self.centres.flatten(0, 1)
        of_class = torch.arange(len(clouds)) // 2
        belongs = (of_class == labels[:, None]) | (labels[:, None] == NUM_CLASSES)
        variance = alpha.square() * _STD**2 + sigma.square()
        from_cloud = (z[:, None] - alpha[..., None] * clouds) / variance[..., None]
        log_share = -0.5 * (from_cloud.square() * variance[..., None]).sum(-1)
        share = log_share.masked_fill(~belongs, -torch.inf).softmax(1)
        x = clouds + alpha[..., None] * _STD**2 * from_cloud
        v = (alpha * sigma)[..., None] * from_cloud - sigma[..., None] * x
        return (share[..., None] * v).sum(1)

    def guided(self, labels: Tensor, w: float, schedule: NoiseSchedule) -> Model:
        """Return the exact guided pair as a function of (z, time), as v."""

        def model(z: Tensor, time: Tensor) -> Tensor:
            alpha, sigma = schedule.alpha_sigma(time, ndim=2)
            of_class = self.velocity(z, alpha, sigma, labels)
            return guide(of_class, self.velocity(z, alpha, sigma, torch.full_like(labels, NUM_CLASSES)), w)

        return model


class PlaneNetwork(ModelMixin, ConfigMixin):
    """A residual MLP, told time and guidance weight as diffusers' U-Nets are, and the class beside them.

    Args:
        width: of the hidden layers.
        depth: number of them.
        time_cond_proj_dim: width of the w embedding; None: no input for w.
        dropout: after each hidden layer.
    """

    @register_to_config
    def __init__(
        self, width: int = 64, depth: int = 3, time_cond_proj_dim: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.time_proj = Timesteps(32, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(32, width, cond_proj_dim=time_cond_proj_dim)
        self.class_embedding = nn.Embedding(NUM_CLASSES + 1, width)
        self.enter = nn.Linear(2, width)
        self.scale_shift = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.hidden = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.Dropout(dropout)) for _ in range(depth)
        )
        self.leave = nn.Sequential(nn.SiLU(), nn.Linear(width, 2))

    @property
    def dtype(self) -> torch.dtype:
        # diffusers' own looks through all modules, which for so small a network takes as long as its layers.
        return self.enter.weight.dtype

    def forward(self, z: Tensor, time: Tensor, label: Tensor, w_embedding: Tensor | None = None) -> Tensor:
        """Return the output at points (B, 2), at times as networks are told them, (B,)."""
        told = self.time_embedding(self.time_proj(time).to(z.dtype), w_embedding) + self.class_embedding(label)
        told = nn.functional.silu(told)
        state = self.enter(z)
        for scale_shift, hidden in zip(self.scale_shift, self.hidden, strict=True):
            scale, shift = scale_shift(told).chunk(2, dim=1)
            state = state + hidden(state * (1 + scale) + shift)
        output: Tensor = self.leave(state)
        return output


def plane_denoiser(
    network: nn.Module, schedule: NoiseSchedule, *, prediction_type: PredictionType = "v_prediction"
) -> Denoiser:
    """Return a network of the plane, conditioned on a label, as a denoiser."""
    return Denoiser(
        network=network,
        forward=_forward,
        schedule=schedule,
        prediction_type=prediction_type,
        condition_names=("label",),
        null={"label": torch.tensor([NUM_CLASSES])},
    )


def _forward(network: nn.Module, z: Tensor, time: Tensor, condition: Condition, w_embedding: Tensor | None) -> Tensor:
    output: Tensor = network(z, time, condition["label"], w_embedding)
    return output
