"""From prompts and seeds to pictures, with a student or a teacher. No Ray, no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from fewstep.diffusion import interval_weight
from fewstep.diffusion.guidance import WeightSchedule
from fewstep.errors import SamplingError
from fewstep.models import Parts, SeededNoise, StudentInfo, sample_student
from fewstep.models.sampling import is_guided

EMPTY_PROMPT = "The prompt is empty: say what to draw, for example 'a red apple, twemoji'."


@torch.inference_mode()
def sample_pixels(
    parts: Parts,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int,
    w: Tensor | WeightSchedule,
    info: StudentInfo | None = None,
    negative_prompt: str | None = None,
) -> Tensor:
    """Return pictures of B prompts, (B, 3, H, W) uint8, by the model's own sampler.

    A student takes one evaluation per step; a teacher is guided with two (classifier-free guidance). Each picture's
    noise comes from a CPU generator of its own seed, as in diffusers with a list of generators.

    Args:
        parts: the model, on any device.
        prompts: B prompts.
        seeds: B seeds.
        num_inference_steps: N.
        w: (B,) guidance weights of the paper, guidance_scale − 1; or w(t).
        info: what the student was made for; without it, a network that takes w is sampled as a deterministic student.
        negative_prompt: in place of the null prompt of a guided model.
    """
    latents = sample_latents(
        parts,
        prompts=prompts,
        seeds=seeds,
        num_inference_steps=num_inference_steps,
        w=w,
        info=info,
        negative_prompt=negative_prompt,
    )
    return parts.decode(latents)


@torch.inference_mode()
def sample_latents(
    parts: Parts,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int,
    w: Tensor | WeightSchedule,
    info: StudentInfo | None = None,
    negative_prompt: str | None = None,
) -> Tensor:
    """Return what `sample_pixels` decodes, (B, c, h, w), for the same arguments."""
    model = parts.denoiser()
    if negative_prompt is not None:
        instead = parts.conditions([{"caption": negative_prompt}])
        model = replace(model, null={name: instead[name] for name in model.null})
    noise = SeededNoise(seeds, parts.sample_shape, device=parts.device)
    return sample_student(
        model,
        info,
        noise.draw(),
        parts.conditions([{"caption": prompt} for prompt in prompts]),
        w=w,
        noise=lambda step: noise.draw(),
        num_inference_steps=num_inference_steps,
    )


def sample_images(
    parts: Parts,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    info: StudentInfo | None = None,
    batch_size: int = 8,
    guidance_interval: tuple[float, float] | None = None,
    negative_prompt: str | None = None,
    extrapolate: bool = False,
) -> list[Image.Image]:
    """Return one picture per prompt and seed.

    Args:
        parts: the model.
        prompts: what to draw.
        seeds: as many as prompts.
        num_inference_steps: N.
        guidance_scale: g = 1 + w.
        info: what the student was made for; None for a teacher.
        batch_size: pictures that go through the network at once.
        guidance_interval: (low, high) of t between which the guidance scale holds; see `weight_in_interval`.
        negative_prompt: what a guided model is led away from.
        extrapolate: take a guidance scale outside the trained range on purpose.

    Raises:
        SamplingError: an empty prompt, unequal lengths, an encoder, steps or guidance that the student was not made
            for, or an option that has no effect on the model.
    """
    if len(prompts) != len(seeds):
        raise SamplingError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed for each prompt")
    if not all(prompt.strip() for prompt in prompts):
        raise SamplingError(EMPTY_PROMPT)
    if info is not None:
        info.check_kind("drawing from a prompt", "deterministic", "stochastic", "naive")
        info.check(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, extrapolate=extrapolate)
    takes_weight = parts.network.config["time_cond_proj_dim"] is not None
    if negative_prompt is not None:
        _check_negative_prompt(is_guided(info, takes_weight=takes_weight), guidance_scale)
    schedule = None
    if guidance_interval is not None:
        schedule = weight_in_interval(
            parts,
            info,
            guidance_scale=guidance_scale,
            interval=guidance_interval,
            num_inference_steps=num_inference_steps,
            extrapolate=extrapolate,
        )
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        chunk = slice(start, start + batch_size)
        pixels = sample_pixels(
            parts,
            prompts=prompts[chunk],
            seeds=seeds[chunk],
            num_inference_steps=num_inference_steps,
            w=schedule or torch.full((len(prompts[chunk]),), guidance_scale - 1, dtype=torch.float32),
            info=info,
            negative_prompt=negative_prompt,
        )
        images += [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]
    return images


def weight_in_interval(
    parts: Parts,
    info: StudentInfo | None,
    *,
    guidance_scale: float,
    interval: tuple[float, float],
    num_inference_steps: int,
    extrapolate: bool = False,
) -> WeightSchedule:
    """Return w(t) that is guidance_scale − 1 at steps that begin within the interval of t, and the least that there is
    elsewhere: 0 for a guided model, the smallest weight of its training for a student (0 all the same with
    `extrapolate`).

    Raises:
        SamplingError: the interval is none, no step begins in it, or the student's weight is built in.
    """
    low, high = interval
    guided = is_guided(info, takes_weight=parts.network.config["time_cond_proj_dim"] is not None)
    if not guided and info is not None and info.has_single_w:
        raise SamplingError(
            f"a guidance interval has no effect on this student: its one weight, w = {info.w_min:g}, is built in"
        )
    least = 0.0 if guided or info is None or extrapolate else max(0.0, info.w_min)
    weight = interval_weight(guidance_scale - 1, low, high, outside=least)
    begins = parts.schedule.fraction(parts.schedule.times(num_inference_steps)[1:])
    if not ((begins >= low) & (begins <= high)).any():
        listed = ", ".join(f"{t:.3g}" for t in begins.flip(0).tolist()[:8])
        raise SamplingError(
            f"no step begins within the guidance interval {low:g} … {high:g}: the {num_inference_steps} steps begin at "
            f"t = {listed}{', …' if num_inference_steps > 8 else ''}; widen it"
        )
    return weight


def _check_negative_prompt(guided: bool, guidance_scale: float) -> None:
    if not guided:
        raise SamplingError(
            "a negative prompt has no effect on this model: its guidance is distilled, so that there is no "
            "unconditional branch left to put it in. Leave it out; say what you want in the prompt"
        )
    if guidance_scale == 1:
        raise SamplingError(
            "a negative prompt has no effect at guidance_scale=1, which is no guidance: raise it or leave one out"
        )
