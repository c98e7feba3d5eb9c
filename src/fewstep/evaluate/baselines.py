"""Sampling for the comparison: the guided teacher with DDIM and with DPM-Solver++, and the students, from one noise.

**DPM-Solver++** gets the settings that serve it best at few steps. On an exact 12-mode mixture in 16 dimensions with
zero terminal SNR, the mean squared distance to the 1000-step end was, at 4 and 8 steps: 2M Heun, "trailing" 0.087,
0.033 (the default here); 2M midpoint 0.091, 0.035; uniform log-SNR times 0.185, 0.124; Karras times 0.702, 0.298;
DDIM 0.121, 0.064. "leading" times came nearer there (0.071, 0.032), but they give pure noise to the network at a time
where it expects a trace of the picture, which on pictures shifts brightness; `DpmSolverSettings` lets a teacher be
tried with them. The first step and the last (to sigma = 0) are of first order, so at 1 and 2 steps it is DDIM.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import DPMSolverMultistepScheduler
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fewstep.diffusion import ddim
from fewstep.diffusion.prediction import PredictionType
from fewstep.diffusion.samplers import Model
from fewstep.diffusion.schedule import BETA_KEYS
from fewstep.errors import ModelError, SamplingError
from fewstep.models import Condition, Denoiser

Method = Literal["teacher", "ddim", "dpmpp", "student"]

#: Who is compared, in words. "teacher" is the reference with many steps; DDIM and DPM-Solver++ are the same teacher.
METHOD_NAMES: Mapping[str, str] = {
    "teacher": "teacher",
    "ddim": "DDIM",
    "dpmpp": "DPM-Solver++",
    "student": "student",
}


class DpmSolverSettings(BaseModel):
    """How diffusers' DPMSolverMultistepScheduler is set as a baseline; names and meanings are diffusers'."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    solver_order: Literal[1, 2, 3] = Field(default=2, description="order of the multistep solver; 2 under guidance")
    solver_type: Literal["heun", "midpoint"] = Field(default="heun", description="form of the second-order term")
    timestep_spacing: Literal["trailing", "leading", "linspace"] = Field(
        default="trailing", description="which times are visited; trailing begins at the noisiest"
    )
    final_sigmas_type: Literal["zero", "sigma_min"] = Field(
        default="zero", description="where the last step ends; zero is the clean picture"
    )


@dataclass(frozen=True, order=True)
class RowSpec:
    """One row of the comparison: a method and its number of steps."""

    method: Method
    num_inference_steps: int


@dataclass(frozen=True)
class Conditions:
    """What all methods start from; row i of each belongs together.

    Attributes:
        condition: what the networks are told, B rows of each part.
        noise: starting noise, (B, C, h, w).
    """

    condition: Condition
    noise: Tensor

    def split(self, batch_size: int) -> Iterator[Conditions]:
        """Yield batches of at most `batch_size` rows, in order."""
        for start in range(0, self.noise.shape[0], batch_size):
            yield self._rows(slice(start, start + batch_size))

    def head(self, count: int) -> Conditions:
        """Return the first `count` rows."""
        return self._rows(slice(count))

    def to(self, device: torch.device) -> Conditions:
        """Return the same on a device."""
        return Conditions({name: value.to(device) for name, value in self.condition.items()}, self.noise.to(device))

    def _rows(self, rows: slice) -> Conditions:
        return Conditions({name: value[rows] for name, value in self.condition.items()}, self.noise[rows])


@dataclass(frozen=True)
class Samples:
    """What sampling gave.

    Attributes:
        latents: (B, C, h, w) float32 on the CPU.
        network_evaluations: per picture, counted at the network: a guided step in one batch of 2B counts 2.
        seconds: network and sampler, without text encoder and decoder.
    """

    latents: Tensor
    network_evaluations: int
    seconds: float


@dataclass(frozen=True)
class Sampler:
    """Samples any row of the comparison.

    Attributes:
        teacher: guided with two evaluations a step.
        students: by number of steps; networks that take a guidance weight. One that lies elsewhere than the teacher's
            is brought to it while it is used: a GPU need not hold all at once.
        scheduler_config: the teacher's diffusers scheduler configuration.
        guidance_scale: g = 1 + w.
        dpm_solver_settings: of the DPM-Solver++ rows.
    """

    teacher: Denoiser
    students: Mapping[int, Denoiser]
    scheduler_config: Mapping[str, Any]
    guidance_scale: float
    dpm_solver_settings: DpmSolverSettings = field(default_factory=DpmSolverSettings)

    @torch.no_grad()
    def __call__(self, spec: RowSpec, conditions: Conditions, *, batch_size: int) -> Samples:
        """Return the samples of one row.

        Raises:
            ModelError: there is no student for this number of steps, or it takes no guidance weight.
        """
        model = self._model(spec)
        device = self.teacher.network.device
        latents, seconds = [], 0.0
        with _brought_to(device, model.network), _counted_rows(model.network) as count:
            for batch in conditions.split(batch_size):
                on_device = batch.to(device)
                _wait_for(device)
                start = time.perf_counter()
                out = self._sample(spec, model, on_device)
                _wait_for(device)
                seconds += time.perf_counter() - start
                latents.append(out.float().cpu())
        rows, pictures = count[0], conditions.noise.shape[0]
        assert rows % pictures == 0, "every picture gets the same number of evaluations"
        return Samples(torch.cat(latents), rows // pictures, seconds)

    def _model(self, spec: RowSpec) -> Denoiser:
        if spec.method != "student":
            return self.teacher
        if spec.num_inference_steps not in self.students:
            raise ModelError(
                f"there is no student for {spec.num_inference_steps} steps (there are students for "
                f"{sorted(self.students)}): distil one, or leave {spec.num_inference_steps} out of evaluate.steps"
            )
        return self.students[spec.num_inference_steps]

    def _sample(self, spec: RowSpec, model: Denoiser, batch: Conditions) -> Tensor:
        w = self.guidance_scale - 1
        network = (model.conditional if spec.method == "student" else model.guided)(batch.condition, w)
        if spec.method == "dpmpp":
            scheduler = dpm_solver(self.scheduler_config, model.prediction_type, settings=self.dpm_solver_settings)
            return _dpm_solver_loop(network, batch.noise, scheduler, spec.num_inference_steps)
        return ddim(
            network,
            batch.noise,
            schedule=model.schedule,
            prediction_type=model.prediction_type,
            num_inference_steps=spec.num_inference_steps,
        )


def dpm_solver(
    scheduler_config: Mapping[str, Any],
    prediction_type: PredictionType,
    *,
    settings: DpmSolverSettings | None = None,
) -> DPMSolverMultistepScheduler:
    """Return diffusers' DPM-Solver++ on the teacher's noise schedule; for its settings see the head of this file.

    Raises:
        SamplingError: an epsilon network with zero terminal SNR, whose noisiest output holds nothing of the picture.
    """
    if prediction_type == "epsilon" and scheduler_config.get("rescale_betas_zero_snr"):
        raise SamplingError(
            "prediction_type='epsilon' with rescale_betas_zero_snr=true cannot be sampled from pure noise "
            "(alpha is 0 there); convert the teacher to v_prediction first"
        )
    betas = {name: scheduler_config[name] for name in BETA_KEYS if scheduler_config.get(name) is not None}
    return DPMSolverMultistepScheduler(
        **betas,
        prediction_type=prediction_type,
        algorithm_type="dpmsolver++",
        lower_order_final=True,
        **(settings or DpmSolverSettings()).model_dump(),
    )


def _dpm_solver_loop(
    model: Model, z: Tensor, scheduler: DPMSolverMultistepScheduler, num_inference_steps: int
) -> Tensor:
    scheduler.set_timesteps(num_inference_steps, device=z.device)
    for t in scheduler.timesteps:
        output = model(z, t.expand(z.shape[0])).float()
        z = scheduler.step(output, t, z, return_dict=False)[0]
    return z


@contextmanager
def _brought_to(device: torch.device, network: Any) -> Iterator[None]:
    home = network.device
    if home == device:
        yield
        return
    network.to(device)
    try:
        yield
    finally:
        network.to(home)


@contextmanager
def _counted_rows(network: nn.Module) -> Iterator[list[int]]:
    """Count the rows that pass the network inside the block; the list's one entry holds the count."""
    count = [0]

    def add(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        count[0] += arguments[0].shape[0]

    hook = network.register_forward_pre_hook(add)
    try:
        yield count
    finally:
        hook.remove()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
