"""Sampling for the comparison: the guided teacher with DDIM and with DPM-Solver++, and the students, from one noise.

**The settings of DPM-Solver++** are those that serve it best at few steps on a teacher with zero terminal SNR:
second-order multistep (2M, midpoint), data prediction, times "trailing" (another spacing starts below the noisiest
time, where the input is not pure noise), last step of first order to sigma = 0 (diffusers' rule below 15 steps), no
Karras or uniform-log-SNR times (with zero terminal SNR they spend half of four steps where nothing is decided).
Its first and last step are of first order, so at 1 and 2 steps it is DDIM.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor, nn

from fewstep.diffusion import NoiseSchedule, ddim
from fewstep.diffusion.prediction import PredictionType
from fewstep.diffusion.samplers import Model
from fewstep.errors import ModelError, SamplingError
from fewstep.models import guided_model, student_model

Method = Literal["teacher", "ddim", "dpmpp", "student"]

#: Who is compared, in words; "teacher" is the reference with many steps.
METHOD_NAMES: Mapping[str, str] = {
    "teacher": "teacher",
    "ddim": "teacher, DDIM",
    "dpmpp": "teacher, DPM-Solver++",
    "student": "student",
}


@dataclass(frozen=True, order=True)
class RowSpec:
    """One row of the comparison: a method and its number of steps."""

    method: Method
    num_inference_steps: int


@dataclass(frozen=True)
class Conditions:
    """What all methods start from; row i of each belongs together.

    Attributes:
        embeddings: prompt embeddings, (B, L, D).
        null_embedding: the empty prompt's, (1, L, D).
        noise: starting noise, (B, C, h, w).
    """

    embeddings: Tensor
    null_embedding: Tensor
    noise: Tensor

    def split(self, batch_size: int) -> Iterator[Conditions]:
        """Yield batches of at most `batch_size` rows, in order."""
        for embeddings, noise in zip(self.embeddings.split(batch_size), self.noise.split(batch_size), strict=True):
            yield Conditions(embeddings, self.null_embedding, noise)

    def head(self, count: int) -> Conditions:
        """Return the first `count` rows."""
        return Conditions(self.embeddings[:count], self.null_embedding, self.noise[:count])


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
        teacher: conditional U-Net that is guided with two evaluations a step.
        students: by number of steps; U-Nets with `time_cond_proj_dim`.
        schedule: noise schedule of all of them.
        scheduler_config: the teacher's diffusers scheduler configuration.
        prediction_type: what the networks return.
        guidance_scale: g = 1 + w.
    """

    teacher: UNet2DConditionModel
    students: Mapping[int, UNet2DConditionModel]
    schedule: NoiseSchedule
    scheduler_config: Mapping[str, Any]
    prediction_type: PredictionType
    guidance_scale: float

    @torch.no_grad()
    def __call__(self, spec: RowSpec, conditions: Conditions, *, batch_size: int) -> Samples:
        """Return the samples of one row.

        Raises:
            ModelError: there is no student for this number of steps, or it takes no guidance weight.
        """
        network = self._network(spec)
        device = network.device
        latents, seconds = [], 0.0
        with _counted_rows(network) as count:
            for batch in conditions.split(batch_size):
                on_device = Conditions(
                    batch.embeddings.to(device), batch.null_embedding.to(device), batch.noise.to(device)
                )
                _wait_for(device)
                start = time.perf_counter()
                out = self._sample(spec, network, on_device)
                _wait_for(device)
                seconds += time.perf_counter() - start
                latents.append(out.float().cpu())
        rows, pictures = count[0], conditions.noise.shape[0]
        assert rows % pictures == 0, "every picture gets the same number of evaluations"
        return Samples(torch.cat(latents), rows // pictures, seconds)

    def _network(self, spec: RowSpec) -> UNet2DConditionModel:
        if spec.method != "student":
            return self.teacher
        if spec.num_inference_steps not in self.students:
            raise ModelError(
                f"there is no student for {spec.num_inference_steps} steps (there are students for "
                f"{sorted(self.students)}): distil one, or leave {spec.num_inference_steps} out of evaluate.steps"
            )
        student = self.students[spec.num_inference_steps]
        if student.config.time_cond_proj_dim is None:
            raise ModelError(
                f"the student for {spec.num_inference_steps} steps has no time_cond_proj_dim, so it takes no guidance "
                "weight: use the U-Net that the guidance and progressive stages made"
            )
        return student

    def _sample(self, spec: RowSpec, network: UNet2DConditionModel, batch: Conditions) -> Tensor:
        w = self.guidance_scale - 1
        if spec.method == "student":
            model = student_model(network, batch.embeddings, w)
        else:
            model = guided_model(network, batch.embeddings, batch.null_embedding, w)
        if spec.method == "dpmpp":
            scheduler = dpm_solver(self.scheduler_config, self.prediction_type)
            return _dpm_solver_loop(model, batch.noise, scheduler, spec.num_inference_steps)
        return ddim(
            model,
            batch.noise,
            schedule=self.schedule,
            prediction_type=self.prediction_type,
            num_inference_steps=spec.num_inference_steps,
        )


def dpm_solver(scheduler_config: Mapping[str, Any], prediction_type: PredictionType) -> DPMSolverMultistepScheduler:
    """Return diffusers' DPM-Solver++ on the teacher's noise schedule; for its settings see the head of this file.

    Raises:
        SamplingError: an epsilon network with zero terminal SNR, whose noisiest output holds nothing of the picture.
    """
    if prediction_type == "epsilon" and scheduler_config.get("rescale_betas_zero_snr"):
        raise SamplingError(
            "prediction_type='epsilon' with rescale_betas_zero_snr=true cannot be sampled from pure noise "
            "(alpha is 0 there); convert the teacher to v_prediction first"
        )
    names = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    betas = {name: scheduler_config[name] for name in names if scheduler_config.get(name) is not None}
    return DPMSolverMultistepScheduler(
        **betas,
        prediction_type=prediction_type,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        timestep_spacing="trailing",
        lower_order_final=True,
        final_sigmas_type="zero",
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
