"""Networks that are formulas: a smooth field of z, time, condition and w in any prediction type, and denoisers of it.

They are diffusers modules with a configuration, so that objectives copy them and give them a w input as they do with
U-Nets. All times are told as the schedule tells networks, which the field turns back.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from fewstep.diffusion import CosineSchedule, NoiseSchedule
from fewstep.diffusion.prediction import PredictionType, convert_output
from fewstep.models.denoiser import Condition, Denoiser

STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}

#: "mild cosine" keeps alpha at 6.7e-3: eps networks are of use in float32 on it.
SCHEDULES: dict[str, NoiseSchedule] = {
    "cosine": CosineSchedule(),
    "mild cosine": CosineSchedule(-10, 10),
    "stable diffusion": NoiseSchedule.from_scheduler_config(STABLE_DIFFUSION),
    "zero terminal snr": NoiseSchedule.from_scheduler_config({**STABLE_DIFFUSION, "rescale_betas_zero_snr": True}),
}


def time_of(schedule: NoiseSchedule, told: Tensor) -> Tensor:
    """Return the times that a network was told."""
    return schedule.time_of_network(told) if isinstance(schedule, CosineSchedule) else told


def w_of(embedding: Tensor) -> Tensor:
    """Return the guidance weights (B,) of their embeddings: the slowest sine is sin(0.1 w)."""
    return 10 * embedding[:, embedding.shape[1] // 2 - 1].double().asin()


def spread(value: Tensor, z: Tensor) -> Tensor:
    """Return (B,) as (B, 1, …) for z."""
    return value.view(-1, *(1,) * (z.ndim - 1)).to(z)


class Field(ModelMixin, ConfigMixin):
    """v(z, t, label, w), written as an output of any prediction type; computed in float64."""

    @register_to_config
    def __init__(
        self,
        schedule: str,
        prediction_type: PredictionType,
        time_cond_proj_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.time_embedding = TimestepEmbedding(4, 4, cond_proj_dim=time_cond_proj_dim)

    def velocity(self, z: Tensor, time: Tensor, label: Tensor, w: Tensor) -> Tensor:
        """Return v at z (B, …), time (B,), label (B,) and w (B,), float64."""
        z = z.double()
        u = spread(SCHEDULES[self.config.schedule].fraction(time), z)
        c, weight = spread(label, z), spread(w, z)
        return torch.sin(1.3 * z + c + 2 * u) + 0.4 * c * u + 0.3 * weight * torch.cos(z - c)

    def forward(self, z: Tensor, told: Tensor, label: Tensor, w_embedding: Tensor | None) -> Tensor:
        schedule = SCHEDULES[self.config.schedule]
        time = time_of(schedule, told)
        w = torch.zeros(len(z), dtype=torch.float64) if w_embedding is None else w_of(w_embedding)
        v = self.velocity(z, time, label, w)
        alpha, sigma = (value.double() for value in schedule.alpha_sigma(time, ndim=z.ndim))
        kind: PredictionType = self.config.prediction_type
        return convert_output(v, z.double(), alpha, sigma, source="v_prediction", target=kind)


def call_with_label(
    network: nn.Module, z: Tensor, told: Tensor, condition: Condition, w_embedding: Tensor | None
) -> Tensor:
    """The `forward` of denoisers conditioned on a label."""
    output: Tensor = network(z, told, condition["label"], w_embedding)
    return output


def denoiser(
    network: nn.Module, schedule: str, prediction_type: PredictionType, *, null_label: float = -1.0
) -> Denoiser:
    """Return a network conditioned on a label (a number for each row) as a denoiser."""
    return Denoiser(
        network=network,
        forward=call_with_label,
        schedule=SCHEDULES[schedule],
        prediction_type=prediction_type,
        condition_names=("label",),
        null={"label": torch.tensor([null_label])},
    )


def field_denoiser(schedule: str, prediction_type: PredictionType, *, w_input: bool = False) -> Denoiser:
    """Return the field as a teacher; with `w_input` as one that is conditioned on w."""
    network = Field(schedule, prediction_type, time_cond_proj_dim=256 if w_input else None)
    return denoiser(network, schedule, prediction_type)


def rows(count: int, *, seed: int = 0) -> dict[str, Any]:
    """Return a batch of `count` clean samples (6,) and labels 0 … 1.5."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "latent_mean": torch.randn(count, 6, generator=generator),
        "latent_std": torch.zeros(count, 6),
        "label": torch.arange(count) % 4 / 2,
    }


def walk(velocity: Any, z: Tensor, times: list[Tensor], schedule: NoiseSchedule) -> Tensor:
    """Return where DDIM takes z along times, by x̂ and eps-hat in float64.

    Args:
        velocity: (z, time (B,)) -> v.
        z: one state, (D,).
        times: times of the schedule, each a scalar.
    """
    state = z.double()[None]
    for here, there in pairwise(times):
        (alpha, sigma), (alpha_s, sigma_s) = (_exact(schedule, u) for u in (here, there))
        # A network knows no clean time of a discrete schedule: it is asked at index 0.
        v = velocity(state, time_of(schedule, schedule.network_time(here[None])))
        state = alpha_s * (alpha * state - sigma * v) + sigma_s * (sigma * state + alpha * v)
    return state[0]


def output_for(z: Tensor, end: Tensor, start_time: Tensor, end_time: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return the v at z that lands on `end`: the turn from the one angle to the other, in float64."""
    (a_t, s_t), (a_s, s_s) = (_exact(schedule, u) for u in (start_time, end_time))
    turn = math.atan2(s_t, a_t) - math.atan2(s_s, a_s)
    return (math.cos(turn) * z.double() - end) / math.sin(turn)


def _exact(schedule: NoiseSchedule, time: Tensor) -> tuple[float, float]:
    if isinstance(schedule, CosineSchedule):
        phi = float(schedule.angle(time))
        return math.cos(phi), math.sin(phi)
    place = int(time) + 1
    return float(schedule.alphas[place]), float(schedule.sigmas[place])  # type: ignore[attr-defined]


class Oracle(nn.Module):
    """A student that takes its teacher's steps itself, along paths written out by hand.

    Args:
        field: of the teacher, or another formula with the same `velocity`.
        schedule: name of the schedule.
        prediction_type: what the student outputs.
        units: L, the paths' times are t = j/L.
        paths: for each start j the times that the teacher visits, the start first.
        guided: the teacher's velocity is (1 + w) v(label) − w v(−1).
        given_w: w of all rows, for students without an input for it.
    """

    def __init__(
        self,
        field: Any,
        schedule: str,
        prediction_type: PredictionType,
        *,
        units: int,
        paths: dict[int, list[int]],
        guided: bool = False,
        given_w: float | None = None,
    ) -> None:
        super().__init__()
        self.field, self.schedule, self.kind = field, SCHEDULES[schedule], prediction_type
        self.times, self.paths = self.schedule.times(units), paths
        self.guided, self.given_w = guided, given_w

    def velocity_at(self, label: Tensor, w: Tensor) -> Any:
        """Return v of one row as a function of state (1, D) and time (1,)."""
        without, plain = torch.full_like(label, -1.0), torch.zeros_like(w)

        def velocity(z: Tensor, time: Tensor) -> Tensor:
            if not self.guided:
                return self.field.velocity(z, time, label, w)
            given = self.field.velocity(z, time, label, plain)
            return given + float(w) * (given - self.field.velocity(z, time, without, plain))

        return velocity

    def target(self, z: Tensor, told: Tensor, label: Tensor, w: Tensor) -> Tensor:
        """Return what the student must output for one row, (D,)."""
        start = int((self.schedule.network_time(self.times).double() - float(told)).abs().argmin())
        visited = [self.times[j] for j in self.paths[start]]
        end = walk(self.velocity_at(label[None], w[None]), z, visited, self.schedule)
        v = output_for(z, end, visited[0], visited[-1], self.schedule)
        alpha, sigma = _exact(self.schedule, visited[0])
        of = (torch.tensor(alpha).double(), torch.tensor(sigma).double())
        return convert_output(v, z.double(), *of, source="v_prediction", target=self.kind)

    def forward(self, z: Tensor, told: Tensor, label: Tensor, w_embedding: Tensor | None) -> Tensor:
        w = torch.full((len(z),), self.given_w) if w_embedding is None else w_of(w_embedding)
        return torch.stack([self.target(*row) for row in zip(z, told, label, w, strict=True)])
