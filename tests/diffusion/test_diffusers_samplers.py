"""Our samplers beside diffusers' schedulers, and our schedules in a solver of theirs."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddim_inverse import DDIMInverseScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from distill.gaussian import Gaussian
from fewstep.diffusion import (
    CosineSchedule,
    DiscreteSchedule,
    NoiseSchedule,
    ddim,
    ddim_encode,
    stochastic,
    stochastic_etas,
)
from fewstep.diffusion.prediction import PredictionType
from fewstep.diffusion.schedulers import CosineDDIMScheduler, StochasticDDIMScheduler
from fewstep.errors import SamplingError
from fewstep.models import initial_noise, load_parts, student_scheduler_config
from tiny import tiny_student_folder

TYPES: tuple[PredictionType, ...] = get_args(PredictionType)
STABLE_DIFFUSION: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}


def _config(kind: PredictionType, *, zero_snr: bool = False) -> dict[str, Any]:
    teacher = {**STABLE_DIFFUSION, "prediction_type": kind, "rescale_betas_zero_snr": zero_snr}
    return student_scheduler_config(teacher)


def _schedule(config: dict[str, Any]) -> DiscreteSchedule:
    schedule = NoiseSchedule.from_scheduler_config(config)
    assert isinstance(schedule, DiscreteSchedule)
    return schedule


def _network(z: Tensor, time: Tensor) -> Tensor:
    """Anything smooth that depends on both."""
    return torch.sin(1.7 * z + time.view(-1, 1).to(z) / 300)


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 25])
@pytest.mark.parametrize("kind", TYPES)
def test_ddim_is_the_stock_scheduler_with_trailing_times(kind: PredictionType, steps: int) -> None:
    config = _config(kind)
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    z = start = _noise(3, 5)
    for t in scheduler.timesteps:
        z = scheduler.step(_network(z, t.expand(3)), t, z, eta=0.0).prev_sample
    ours = ddim(_network, start, schedule=_schedule(config), prediction_type=kind, num_inference_steps=steps)
    # An eps output is divided by alpha = 0.068 at the noisiest time, and what comes of it feeds the next step.
    torch.testing.assert_close(ours, z, rtol=1e-5, atol=1e-3 if kind == "epsilon" else 3e-5)


ETAS = {
    ("stable diffusion", 1): [0.0],
    ("stable diffusion", 2): [1.0061, 0.0],
    ("stable diffusion", 4): [0.9567, 0.9829, 1.1075, 0.0],
    ("stable diffusion", 8): [0.9567, 0.9553, 0.9628, 0.9822, 1.0165, 1.0759, 1.2210, 0.0],
    ("cosine", 4): [0.9102, 1.0, 1.0987, 0.0],
}


@pytest.mark.parametrize(("name", "steps"), ETAS)
def test_the_etas_of_the_stochastic_sampler(name: str, steps: int) -> None:
    schedule: NoiseSchedule = CosineSchedule() if name == "cosine" else _schedule(_config("v_prediction"))
    assert stochastic_etas(schedule, steps) == pytest.approx(ETAS[name, steps], abs=5e-5)


def _etas(schedule: DiscreteSchedule, steps: int) -> list[float]:
    """eta_i = sigma_{s|k} / sqrt((sigma_s²/sigma_t²)(1 − alpha_t²/alpha_s²)); s is one grid step on from t, k two."""
    squares = (schedule.alphas[schedule.times(steps) + 1] ** 2).tolist()
    etas = []
    for i in range(steps, 1, -1):
        t, s, k = squares[i], squares[i - 1], squares[i - 2]
        # e^(lambda_s − lambda_k) = SNR_s/SNR_k, 0 where k is clean.
        ratio = (s / (1 - s)) * ((1 - k) / k)
        etas.append(math.sqrt((1 - ratio) * (1 - s) / ((1 - s) / (1 - t) * (1 - t / s))))
    return [*etas, 0.0]


@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize("kind", TYPES)
def test_the_stochastic_sampler_is_stock_ddim_with_those_etas(kind: PredictionType, steps: int) -> None:
    """With etas of the float64 tables; the last but one a hair smaller, for there DDIM takes the root of nothing."""
    config = _config(kind)
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    noises = _noise(steps, 3, 5, seed=1)
    etas = _etas(_schedule(config), steps)
    assert stochastic_etas(_schedule(config), steps) == pytest.approx(etas, rel=1e-6)
    z = start = _noise(3, 5).double()
    for step, t in enumerate(scheduler.timesteps):
        eta = etas[step] * (1 - 1e-13)
        output = _network(z, t.expand(3))
        z = scheduler.step(output, t, z, eta=eta, variance_noise=noises[step].double()).prev_sample
    ours = stochastic(
        _network,
        start,
        schedule=_schedule(config),
        prediction_type=kind,
        num_inference_steps=steps,
        noise=lambda step: noises[step],
    )
    torch.testing.assert_close(ours.double(), z, rtol=1e-5, atol=1e-3 if kind == "epsilon" else 3e-5)


@pytest.mark.parametrize("zero_snr", [False, True], ids=["stable diffusion", "zero terminal snr"])
@pytest.mark.parametrize("steps", [n for n in range(1, 251) if 1000 % n == 0])
def test_the_stochastic_scheduler_is_finite_and_ours_at_every_step_count(steps: int, zero_snr: bool) -> None:
    config = _config("v_prediction", zero_snr=zero_snr)
    scheduler = StochasticDDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    z = start = _noise(2, 5)
    noises = _noise(steps, 2, 5, seed=1)
    for step, t in enumerate(scheduler.timesteps):
        z, x = scheduler.step(_network(z, t.expand(2)), t, z, variance_noise=noises[step], return_dict=False)
    assert torch.equal(z, x), "the last step ends at the clean picture"
    ours = stochastic(
        _network,
        start,
        schedule=_schedule(config),
        prediction_type="v_prediction",
        num_inference_steps=steps,
        noise=lambda step: noises[step],
    )
    torch.testing.assert_close(z, ours, rtol=0, atol=1e-4)


def test_the_stochastic_scheduler_computes_in_float32_whatever_the_network_does() -> None:
    scheduler = StochasticDDIMScheduler.from_config(_config("v_prediction"))
    scheduler.set_timesteps(4)
    z, output, noise = _noise(3, 3, 5).to(torch.bfloat16)
    for t in scheduler.timesteps:
        half = scheduler.step(output, t, z, variance_noise=noise).prev_sample
        full = scheduler.step(output.float(), t, z.float(), variance_noise=noise.float()).prev_sample
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, full.to(torch.bfloat16))


def test_the_stochastic_scheduler_clips_where_its_configuration_says_so() -> None:
    config = {**_config("sample"), "clip_sample": True, "clip_sample_range": 0.5}
    scheduler = StochasticDDIMScheduler.from_config(config)
    scheduler.set_timesteps(2)
    z, output = _noise(2, 3, 5)
    step = scheduler.step(3 * output, 999, z, variance_noise=torch.zeros(3, 5))
    assert float(step.pred_original_sample.abs().max()) == 0.5
    # t = 1 jumps to the clean picture and comes back to 1/2: alpha x̂ without noise.
    alpha = _schedule(config).alphas[500]
    torch.testing.assert_close(step.prev_sample, alpha.float() * (3 * output).clamp(-0.5, 0.5), rtol=1e-5, atol=1e-6)


def test_the_stochastic_scheduler_refuses_what_would_leave_its_grid() -> None:
    scheduler = StochasticDDIMScheduler.from_config(_config("v_prediction"))
    for steps in (0, 3, 16):
        with pytest.raises(SamplingError, match=f"num_inference_steps={steps} does not divide num_train_timesteps=100"):
            scheduler.set_timesteps(steps)
    scheduler.set_timesteps(4)
    z = torch.zeros(1, 2)
    with pytest.raises(SamplingError, match=r"eta=0\.5 was given"):
        scheduler.step(z, 999, z, eta=0.5)
    for strange in (998, -1):
        with pytest.raises(SamplingError, match=f"timestep={strange} is none of the 4"):
            scheduler.step(z, strange, z)
    leading = StochasticDDIMScheduler.from_config({**_config("v_prediction"), "timestep_spacing": "leading"})
    with pytest.raises(SamplingError, match="timestep_spacing='leading'"):
        leading.set_timesteps(4)


PROMPTS = ["a red apple", "two birds on blue"]


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_a_students_folder_samples_stochastically_in_the_stock_pipeline(tmp_path: Path, steps: int) -> None:
    folder = tiny_student_folder(tmp_path / "student", num_inference_steps=steps)
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = StochasticDDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    noise = initial_noise(range(2), (4, 4, 4))

    def stock(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 4.0, "output_type": "latent"}
        return pipe(PROMPTS, latents=noise, generator=generator, **settings).images

    parts = load_parts(folder)
    generator = torch.Generator().manual_seed(3)
    calls: list[int] = []
    hook = parts.unet.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    ours = stochastic(
        parts.denoiser().conditional({"text": parts.encode_prompts(PROMPTS)}, 3.0),
        noise,
        schedule=parts.schedule,
        prediction_type=parts.prediction_type,
        num_inference_steps=steps,
        noise=lambda step: randn_tensor(noise.shape, generator=generator),
    )
    hook.remove()
    assert calls == [2] * steps, "as many evaluations as the deterministic sampler"
    torch.testing.assert_close(stock(3), ours, rtol=0, atol=1e-5)
    # The generator is the pipeline's own: the same one again, and another.
    assert torch.equal(stock(3), stock(3))
    if steps > 1:
        assert float((stock(4) - stock(3)).abs().max()) > 1e-2


def test_a_stochastic_scheduler_also_starts_half_way(tmp_path: Path) -> None:
    """Image to image at strength 0.5: the last two of four steps."""
    folder = tiny_student_folder(tmp_path / "student", num_inference_steps=4)
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = StochasticDDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    image = torch.rand(1, 3, 16, 16)
    calls: list[int] = []
    hook = pipe.unet.register_forward_hook(lambda module, args, output: calls.append(int(args[1])))
    end = pipe(
        PROMPTS[:1], image=image, strength=0.5, num_inference_steps=4, guidance_scale=4.0, output_type="latent"
    ).images
    hook.remove()
    assert calls == [499, 249]
    assert bool(torch.isfinite(end).all())


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_the_cosine_scheduler_is_our_deterministic_sampler(steps: int, kind: PredictionType, clip: bool) -> None:
    scheduler = CosineDDIMScheduler(prediction_type=kind, clip_sample=clip)
    scheduler.set_timesteps(steps)
    schedule = scheduler.schedule
    z = start = 2 * _noise(3, 5)
    for told in scheduler.timesteps:
        z = scheduler.step(_network(z, told.expand(3)), told, z).prev_sample
    ours = ddim(
        lambda z, time: _network(z, schedule.network_time(time)),
        start,
        schedule=schedule,
        prediction_type=kind,
        num_inference_steps=steps,
        clip_sample=clip,
    )
    torch.testing.assert_close(z, ours, rtol=0, atol=1e-5)


def test_clipping_keeps_x_in_range_and_eps_in_step_with_it() -> None:
    schedule, seen = CosineSchedule(), []

    def model(z: Tensor, time: Tensor) -> Tensor:
        return 3 * _network(z, time)

    end = ddim(
        model,
        _noise(3, 5),
        schedule=schedule,
        prediction_type="sample",
        num_inference_steps=4,
        clip_sample=True,
        callback=seen.append,
    )
    assert max(float(step.denoised.abs().max()) for step in seen) == 1.0
    assert float(end.abs().max()) <= 1.0001
    # z_s = alpha_s x̂ + sigma_s eps̃ with the eps̃ that belongs to the clipped x̂, for the step from t = 3/4 to 1/2.
    phi = schedule.angle(schedule.times(4))
    before, after, x = seen[0].z.double(), seen[1].z.double(), seen[1].denoised.double()
    eps = (before - phi[3].cos() * x) / phi[3].sin()
    torch.testing.assert_close(after, phi[2].cos() * x + phi[2].sin() * eps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_the_cosine_scheduler_is_our_stochastic_sampler(steps: int, clip: bool) -> None:
    scheduler = CosineDDIMScheduler(stochastic=True, clip_sample=clip)
    scheduler.set_timesteps(steps)
    schedule = scheduler.schedule
    z = start = 2 * _noise(3, 5)
    generator = torch.Generator().manual_seed(9)
    for told in scheduler.timesteps:
        z = scheduler.step(_network(z, told.expand(3)), told, z, generator=generator).prev_sample
    generator = torch.Generator().manual_seed(9)
    ours = stochastic(
        lambda z, time: _network(z, schedule.network_time(time)),
        start,
        schedule=schedule,
        prediction_type="v_prediction",
        num_inference_steps=steps,
        noise=lambda step: torch.randn(3, 5, generator=generator),
        clip_sample=clip,
    )
    torch.testing.assert_close(z, ours, rtol=0, atol=1e-5)


def test_the_cosine_scheduler_survives_its_folder_and_noises_pictures(tmp_path: Path) -> None:
    CosineDDIMScheduler(logsnr_min=-12, stochastic=True, prediction_type="sample").save_pretrained(tmp_path)
    scheduler = CosineDDIMScheduler.from_pretrained(tmp_path)
    assert (scheduler.config.logsnr_min, scheduler.config.stochastic, scheduler.config.prediction_type) == (
        -12,
        True,
        "sample",
    )
    scheduler.set_timesteps(4)
    x, eps = torch.full((4, 3), 2.0), torch.full((4, 3), 5.0)
    z = scheduler.add_noise(x, eps, scheduler.timesteps)
    phi = scheduler.schedule.angle(torch.tensor([1, 0.75, 0.5, 0.25], dtype=torch.float64))
    torch.testing.assert_close(z[:, 0].double(), 2 * phi.cos() + 5 * phi.sin(), rtol=0, atol=1e-5)
    with pytest.raises(SamplingError, match="timestep=3 is none of the 4 that set_timesteps made"):
        scheduler.step(x, 3.0, x)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_encoding_is_the_stock_inverse_scheduler(steps: int) -> None:
    """Given the same outputs: diffusers' loop asks the network at the time that it goes to, ours where it stands."""
    config = _config("v_prediction")
    scheduler = DDIMInverseScheduler.from_config(config, steps_offset=0)
    scheduler.set_timesteps(steps)
    schedule = _schedule(config)
    assert [-1, *scheduler.timesteps.tolist()] == schedule.times(steps).tolist()
    z = x = _noise(3, 5)
    for s, t in pairwise(schedule.times(steps)):
        z = scheduler.step(_network(z, s.expand(3)), t, z).prev_sample
    ours = ddim_encode(_network, x, schedule=schedule, prediction_type="v_prediction", num_inference_steps=steps)
    torch.testing.assert_close(ours, z, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_encoding_without_a_v_network_is_refused(kind: PredictionType) -> None:
    with pytest.raises(SamplingError, match=f"prediction_type={kind}: encoding needs a v_prediction network"):
        ddim_encode(_network, _noise(1, 2), schedule=CosineSchedule(), prediction_type=kind, num_inference_steps=4)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpmpp", 2)])
def test_solvers_reach_the_exact_flow_at_their_order(solver: str, order: int) -> None:
    """From pure noise to t = 1/4 on Stable Diffusion's betas, against the flow of a Gaussian written out."""
    config = _config("v_prediction")
    schedule = _schedule(config)
    model = Gaussian(schedule)
    z = torch.tensor([[-1.5], [2.0]])
    ends = (schedule.alphas[1000], schedule.sigmas[1000], schedule.alphas[250], schedule.sigmas[250])
    exact = model.flow(z.double(), *ends)

    def error(steps: int) -> float:
        if solver == "ddim":
            reached: list[Tensor] = []
            ddim(
                model,
                z,
                schedule=schedule,
                prediction_type="v_prediction",
                num_inference_steps=steps,
                callback=lambda step: reached.append(step.z),
            )
            return float((reached[3 * steps // 4 - 1].double() - exact).abs().max())
        scheduler = DPMSolverMultistepScheduler.from_config(config, final_sigmas_type="zero")
        scheduler.set_timesteps(steps)
        state = z.double()
        for t in scheduler.timesteps[: 3 * steps // 4]:
            state = scheduler.step(model(state, t.expand(2)), t, state).prev_sample
        return float((state - exact).abs().max())

    errors = [error(steps) for steps in (20, 40, 100)]
    slopes = -np.diff(np.log(errors)) / np.diff(np.log([20, 40, 100]))
    assert slopes == pytest.approx([order, order], abs=0.35)
    assert errors[-1] < {1: 2e-2, 2: 1e-3}[order]
