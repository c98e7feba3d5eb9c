"""A network with all that belongs to calling it: which schedule, what it outputs, what it is conditioned on.

Objectives and samplers work with this alone; what kind of model it is (text or class, latent or pixel) only the file of
its family knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import WeightSchedule, guide
from fewstep.diffusion.prediction import PredictionType
from fewstep.diffusion.samplers import Model
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.errors import SamplingError
from fewstep.models.embedding import guidance_embedding

#: What a network is conditioned on, by name; one row a picture.
Condition = Mapping[str, Tensor]

#: (network, z, time as the network is told it (B,), condition, embedding of w or None) -> output.
Forward = Callable[[nn.Module, Tensor, Tensor, Condition, Tensor | None], Tensor]


@dataclass(frozen=True)
class Denoiser:
    """A denoising network and how it is called.

    Attributes:
        network: the network; `config["time_cond_proj_dim"]` says whether it takes a guidance weight.
        forward: how its family calls it.
        schedule: its noise schedule.
        prediction_type: what it outputs.
        null: what replaces a part of the condition in the unconditional branch, one row each; parts that are not named
            (sizes, masks) stay. Empty for a model that has no unconditional branch.
        condition_names: the parts of the condition.
        clip_sample: x̂ is kept within [−1, 1] while sampling, as its scheduler says of pictures in pixels; targets of
            training never are.
    """

    network: Any
    forward: Forward
    schedule: NoiseSchedule
    prediction_type: PredictionType
    condition_names: tuple[str, ...]
    null: Condition = field(default_factory=dict)
    clip_sample: bool = False

    @property
    def embedding_dim(self) -> int | None:
        """Width of the w embedding that the network takes; None when it takes none."""
        dim: int | None = self.network.config["time_cond_proj_dim"]
        return dim

    def with_network(self, network: Any, *, prediction_type: PredictionType | None = None) -> Denoiser:
        """Return the same with another network, perhaps of another prediction type."""
        return replace(self, network=network, prediction_type=prediction_type or self.prediction_type)

    def condition_of(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the condition of a batch, in the network's precision."""
        return self._in_precision({name: batch[name] for name in self.condition_names})

    def _in_precision(self, condition: Condition) -> dict[str, Tensor]:
        dtype = self.network.dtype
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.items()}

    def unconditional(self, condition: Condition) -> dict[str, Tensor]:
        """Return the condition of the unconditional branch.

        Raises:
            SamplingError: the model has none.
        """
        if not self.null:
            raise SamplingError("this model has no unconditional branch, so guidance cannot be applied to it")
        return {
            name: self.null[name].to(value).expand_as(value) if name in self.null else value
            for name, value in condition.items()
        }

    def embed_weight(self, w: Tensor | None, rows: int, device: torch.device) -> Tensor | None:
        """Return the embedding of guidance weights, (B, D); None for a network without that input.

        Raises:
            SamplingError: the network takes a weight and none was given.
        """
        if self.embedding_dim is None:
            return None
        if w is None:
            raise SamplingError(
                f"the network is conditioned on the guidance weight (time_cond_proj_dim={self.embedding_dim}): "
                "give w, guidance_scale − 1"
            )
        return guidance_embedding(w.to(device).expand(rows), self.embedding_dim)

    def call(
        self, network: nn.Module, z: Tensor, time: Tensor, condition: Condition, w: Tensor | None = None
    ) -> Tensor:
        """Return the output of `network` (this one, or a wrapper or copy of it) at z_t, float32, z's shape.

        Args:
            z: (B, …).
            time: (B,) times of the schedule.
            condition: B rows.
            w: guidance weights (B,), for networks that take them.
        """
        dtype, inputs = self.network.dtype, self._in_precision(condition)
        embedding = self.embed_weight(w, z.shape[0], z.device)
        if embedding is not None:
            embedding = embedding.to(dtype)
        return self.forward(network, z.to(dtype), self.schedule.network_time(time), inputs, embedding).float()

    def conditional(self, condition: Condition, w: Tensor | float | WeightSchedule | None = None) -> Model:
        """Return the network with its condition as a function of (z, time): one evaluation for each picture and step.

        Args:
            condition: one row a picture.
            w: guidance weight: a number, (B,), or w(t) as a function of t in [0, 1] (see `interval_weight`).
        """

        def model(z: Tensor, time: Tensor) -> Tensor:
            return self.call(self.network, z, time, condition, self._weights(w, z, time))

        return model

    def guided(self, condition: Condition, w: Tensor | float | WeightSchedule) -> Model:
        """Return the classifier-free-guided network as a function of (z, time); both branches in one batch of 2B.

        Args:
            condition: one row a picture.
            w: as for `conditional`.
        """
        unconditional = self.unconditional(condition)
        both = {name: torch.cat([value, unconditional[name]]) for name, value in condition.items()}

        def model(z: Tensor, time: Tensor) -> Tensor:
            # In float32: w would otherwise be rounded to the network's precision, which the student's own w is not.
            output = self.call(self.network, torch.cat([z, z]), torch.cat([time, time]), both)
            with_condition, without = output.chunk(2)
            weights = self._weights(w, z, time)
            assert weights is not None
            return guide(with_condition, without, weights)

        return model

    def _weights(self, w: Tensor | float | WeightSchedule | None, z: Tensor, time: Tensor) -> Tensor | None:
        if w is None or isinstance(w, Tensor):
            return w
        if callable(w):
            return w(self.schedule.fraction(time))
        return torch.full((z.shape[0],), float(w), device=z.device)
