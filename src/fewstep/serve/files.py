"""Pictures made without a server, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from fewstep.errors import SamplingError
from fewstep.models import Parts, StudentInfo
from fewstep.serve.encode import Provenance, encode_image
from fewstep.serve.sample import sample_images

_TEACHER_STEPS = 50
_TEACHER_GUIDANCE_SCALE = 4.0


def default_device() -> torch.device:
    """Return the GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def save_images(
    folder: Path,
    parts: Parts,
    info: StudentInfo | None,
    *,
    model: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    negative_prompt: str | None = None,
    extrapolate: bool = False,
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
        guidance_interval, negative_prompt, extrapolate: as for `sample_images`.

    Raises:
        SamplingError: as `sample_images`.
    """
    num_inference_steps = default_steps(info, num_inference_steps, model=model)
    guidance_scale = default_guidance_scale(info, guidance_scale)
    images = sample_images(
        parts,
        prompts=prompts,
        seeds=seeds,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        info=info,
        guidance_interval=guidance_interval,
        negative_prompt=negative_prompt,
        extrapolate=extrapolate,
    )
    details = {} if negative_prompt is None else {"negative_prompt": negative_prompt}
    if guidance_interval is not None:
        details["guidance_interval"] = "{:g} … {:g}".format(*guidance_interval)
    notes = [
        Provenance(prompt, seed, num_inference_steps, guidance_scale, model, details)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return write_images(folder, images, notes)


def default_steps(info: StudentInfo | None, num_inference_steps: int | None, *, model: str) -> int:
    """Return the steps that are asked for, else the student's own, else 50 for a teacher.

    Raises:
        SamplingError: a student of stage one, without a number.
    """
    if num_inference_steps is None:
        num_inference_steps = _TEACHER_STEPS if info is None else info.num_inference_steps
    if num_inference_steps is None:
        raise SamplingError(
            f"{model} is a student of stage one, which works with any number of steps: name one (--steps)"
        )
    return num_inference_steps


def default_guidance_scale(info: StudentInfo | None, guidance_scale: float | None) -> float:
    """Return the guidance scale that is asked for, else the student's default, else 4 for a teacher."""
    if guidance_scale is not None:
        return guidance_scale
    if info is None:
        return _TEACHER_GUIDANCE_SCALE
    # The recipe's default is that of all its students, whatever the one weight of this one.
    return 1 + info.w_min if info.has_single_w else info.guidance_scale


def write_images(folder: Path, images: Sequence[Image.Image], notes: Sequence[Provenance]) -> list[Path]:
    """Write one PNG for each picture, named by its number and seed, and return the files; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, (image, provenance) in enumerate(zip(images, notes, strict=True)):
        file = folder / f"{number:03d}-seed{provenance.seed}.png"
        file.write_bytes(encode_image(image, provenance))
        files.append(file)
    return files
