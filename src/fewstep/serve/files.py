"""Pictures made without a server, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep.errors import SamplingError
from fewstep.models import StudentInfo, TextToImageParts
from fewstep.serve.encode import Provenance, encode_image
from fewstep.serve.sample import sample_images

_TEACHER_STEPS = 50
_TEACHER_GUIDANCE_SCALE = 4.0


def default_device() -> torch.device:
    """Return the GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def save_images(
    folder: Path,
    parts: TextToImageParts,
    info: StudentInfo | None,
    *,
    model: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> list[Path]:
    """Write one PNG for each prompt, named by its number and seed, and return the files.

    Args:
        folder: made if need be.
        parts: the model.
        info: what the student was made for; None for a teacher, which is guided with two evaluations a step.
        model: name that is written into the files.
        prompts: what to draw.
        seeds: as many as prompts.
        num_inference_steps: None takes what the student was made for (a teacher: 50).
        guidance_scale: None takes the student's default (a teacher: 4).

    Raises:
        SamplingError: an empty prompt, or steps or guidance that the student was not made for.
    """
    if num_inference_steps is None:
        num_inference_steps = _TEACHER_STEPS if info is None else info.num_inference_steps
    if num_inference_steps is None:
        raise SamplingError(
            f"{model} is a student of stage one, which works with any number of steps: name one (--steps)"
        )
    if guidance_scale is None:
        guidance_scale = _TEACHER_GUIDANCE_SCALE if info is None else info.guidance_scale
    images = sample_images(
        parts,
        prompts=prompts,
        seeds=seeds,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        info=info,
    )
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, (image, prompt, seed) in enumerate(zip(images, prompts, seeds, strict=True)):
        provenance = Provenance(prompt, seed, num_inference_steps, guidance_scale, model)
        file = folder / f"{number:03d}-seed{seed}.png"
        file.write_bytes(encode_image(image, provenance))
        files.append(file)
    return files
