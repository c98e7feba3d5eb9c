"""From prompts and seeds to pictures, with a student or a teacher. No Ray, no HTTP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from fewstep.diffusion import ddim
from fewstep.errors import SamplingError
from fewstep.models import StudentInfo, TextToImageParts, guided_model, initial_noise, student_model

EMPTY_PROMPT = "The prompt is empty: say what to draw, for example 'a red apple, twemoji'."


@torch.inference_mode()
def sample_pixels(
    parts: TextToImageParts,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int,
    w: Tensor,
) -> Tensor:
    """Return pictures of B prompts, (B, 3, H, W) uint8, by the deterministic sampler.

    A w-conditioned U-Net takes one evaluation per step; another one is guided with two (classifier-free guidance).
    Each picture's noise comes from a CPU generator of its own seed, as in diffusers with a list of generators.

    Args:
        parts: the model, on any device.
        prompts: B prompts.
        seeds: B seeds.
        num_inference_steps: N.
        w: (B,) guidance weights of the paper, guidance_scale − 1.
    """
    text = parts.encode_prompts(prompts)
    w = w.to(parts.device)
    # `config` is put on the class by a decorator that type checkers cannot follow.
    if parts.unet.config.time_cond_proj_dim is not None:
        model = student_model(parts.unet, text, w)
    else:
        model = guided_model(parts.unet, text, parts.encode_prompts([""]), w)
    latents = ddim(
        model,
        initial_noise(seeds, parts.latent_shape, device=parts.device),
        schedule=parts.schedule,
        prediction_type=parts.prediction_type,
        num_inference_steps=num_inference_steps,
    )
    return parts.decode(latents)


def sample_images(
    parts: TextToImageParts,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    info: StudentInfo | None = None,
    batch_size: int = 8,
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

    Raises:
        SamplingError: an empty prompt, unequal lengths, or steps or guidance that the student was not made for.
    """
    if len(prompts) != len(seeds):
        raise SamplingError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed for each prompt")
    if not all(prompt.strip() for prompt in prompts):
        raise SamplingError(EMPTY_PROMPT)
    if info is not None:
        info.check(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        chunk = slice(start, start + batch_size)
        w = torch.full((len(prompts[chunk]),), guidance_scale - 1, dtype=torch.float32)
        pixels = sample_pixels(
            parts, prompts=prompts[chunk], seeds=seeds[chunk], num_inference_steps=num_inference_steps, w=w
        )
        images += [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]
    return images
