"""The student: the teacher's U-Net with the guidance weight as a further input, and the folder that it ships in."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor

from fewstep.errors import ModelError, SamplingError
from fewstep.models.architecture import unet_like
from fewstep.models.parts import TextToImageParts

INFO_FILE = "fewstep.json"


def guidance_embedding(w: Tensor, embedding_dim: int) -> Tensor:
    """Return the embedding of guidance weights that diffusers' pipelines compute, (B, embedding_dim), float32.

    Equal to `StableDiffusionPipeline.get_guidance_scale_embedding`, which gets w = guidance_scale − 1
    (VDM's sinusoid of 1000 w).

    Args:
        w: (B,) guidance weights in the paper's convention.
        embedding_dim: the U-Net's `time_cond_proj_dim`.
    """
    half = embedding_dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=w.device) * -(math.log(10000.0) / (half - 1))
    )
    angles = (w.float() * 1000.0)[:, None] * frequencies[None, :]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, embedding_dim % 2))


def make_student(teacher: UNet2DConditionModel, *, embedding_dim: int = 256) -> UNet2DConditionModel:
    """Return a w-conditioned copy of a teacher's U-Net, trainable.

    The one new weight, `time_embedding.cond_proj`, starts at zero: at initialisation the student equals the conditional
    teacher bit for bit, whatever w.

    Raises:
        ModelError: the teacher already takes a guidance weight.
    """
    conditioned = teacher.config["time_cond_proj_dim"]
    if conditioned is not None:
        raise ModelError(
            f"the teacher is already conditioned on w (its U-Net has time_cond_proj_dim={conditioned}): "
            "stage one needs a model that is sampled with classifier-free guidance"
        )
    student = unet_like(teacher, time_cond_proj_dim=embedding_dim, dropout=0.0)
    state = dict(teacher.state_dict())
    state["time_embedding.cond_proj.weight"] = torch.zeros_like(student.time_embedding.cond_proj.weight)
    student.load_state_dict(state)
    return student.train()


def copy_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return a trainable copy of a U-Net with the same weights."""
    copy = unet_like(unet)
    copy.load_state_dict(unet.state_dict())
    return copy.requires_grad_(True).train()


@dataclass(frozen=True)
class StudentInfo:
    """What a student was made for; `fewstep.json` in its folder.

    Attributes:
        stage: "guidance" (stage one, any step count) or "progressive" (stage two, one step count).
        num_inference_steps: the N it was trained for; None for stage one.
        w_min, w_max: range of the guidance weight in training (guidance_scale − 1).
        guidance_scale: default for sampling.
        teacher: URI of the teacher.
        fingerprint: digest of the settings and inputs that made it.
    """

    stage: str
    num_inference_steps: int | None
    w_min: float
    w_max: float
    guidance_scale: float
    teacher: str
    fingerprint: str
    format_version: int = 1

    def check(self, *, num_inference_steps: int, guidance_scale: float) -> None:
        """Refuse a step count or guidance scale that the student was not trained for.

        Raises:
            SamplingError: naming what it was trained for.
        """
        if self.num_inference_steps is not None and num_inference_steps != self.num_inference_steps:
            raise SamplingError(
                f"num_inference_steps={num_inference_steps}, but this student was made for "
                f"{self.num_inference_steps}: its network jumps exactly between those times. "
                f"Use {self.num_inference_steps}, or load the student for {num_inference_steps}"
            )
        low, high = 1 + self.w_min, 1 + self.w_max
        if not low - 1e-6 <= guidance_scale <= high + 1e-6:
            raise SamplingError(
                f"guidance_scale={guidance_scale:g} is outside {low:g} … {high:g}, the range that the student was "
                f"trained on (guidance_scale = 1 + w, w in {self.w_min:g} … {self.w_max:g})"
            )


def student_scheduler_config(teacher_config: dict[str, Any]) -> dict[str, Any]:
    """Return the DDIMScheduler configuration that samples a student exactly: trailing times, ending at alpha = 1.

    The noise schedule and the prediction type stay the teacher's. `steps_offset=1` has no effect with trailing spacing;
    StableDiffusionPipeline would overwrite another value with a warning.
    """
    kept = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "rescale_betas_zero_snr",
    )
    return {
        "_class_name": "DDIMScheduler",
        "prediction_type": "epsilon",
        **{key: teacher_config[key] for key in kept if key in teacher_config},
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "clip_sample": False,
        "thresholding": False,
    }


def save_student(folder: Path | str, teacher: TextToImageParts, unet: UNet2DConditionModel, info: StudentInfo) -> None:
    """Write a student as a diffusers folder: the teacher's VAE, text encoder and tokenizer, the student's U-Net, a
    scheduler that samples it exactly, and `fewstep.json`."""
    parts = replace(teacher, unet=unet, scheduler_config=student_scheduler_config(teacher.scheduler_config))
    parts.save(folder)
    (Path(folder) / INFO_FILE).write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")


def copy_student(folder: Path | str, target: Path | str, info: StudentInfo) -> None:
    """Write a student's folder a second time, saying other things of itself; weights are linked where they can be."""
    shutil.copytree(folder, target, copy_function=_link_or_copy, ignore=shutil.ignore_patterns(INFO_FILE))
    (Path(target) / INFO_FILE).write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def read_student_info(folder: Path | str) -> StudentInfo | None:
    """Return what a student's folder says of itself, or None when the folder holds no student of ours.

    Raises:
        ModelError: `fewstep.json` is there but cannot be used.
    """
    file = Path(folder) / INFO_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        info = StudentInfo(**{f.name: content[f.name] for f in fields(StudentInfo)})
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} is damaged ({error!r}): export the student again") from error
    if info.format_version != 1:
        raise ModelError(f"{file} has format_version={info.format_version}, this fewstep reads 1: update fewstep")
    return info
