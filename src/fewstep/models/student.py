"""The student: the teacher's U-Net with the guidance weight as a further input, and the folder that it ships in."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models import UNet2DConditionModel
from torch import nn

from fewstep.diffusion.cosine import CosineSchedule
from fewstep.diffusion.prediction import PredictionType
from fewstep.diffusion.schedule import BETA_KEYS
from fewstep.errors import ModelError, SamplingError
from fewstep.models.architecture import unet_like
from fewstep.models.parts import Parts

INFO_FILE = "fewstep.json"

#: How a student is sampled.
StudentKind = Literal["deterministic", "stochastic", "encoder", "naive"]


def make_student(teacher: UNet2DConditionModel, *, embedding_dim: int | None = 256) -> UNet2DConditionModel:
    """Return a w-conditioned copy of a teacher's U-Net, trainable.

    The one new weight, `time_embedding.cond_proj`, starts at zero: at initialisation the student equals the conditional
    teacher bit for bit, whatever w.

    Args:
        teacher: a U-Net that is sampled with classifier-free guidance.
        embedding_dim: width of the w embedding; None: no input for w, for a student of one single w.

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
    if embedding_dim is not None:
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
        stage: "guidance" (stage one, any step count), "progressive" (stage two, one step count), or "convert" (a
            teacher of another prediction type; guided still).
        num_inference_steps: the N it was trained for; None for stage one.
        w_min, w_max: range of the guidance weight in training (guidance_scale − 1).
        guidance_scale: default for sampling.
        teacher: URI of the teacher.
        fingerprint: digest of the settings and inputs that made it.
        kind: how it is sampled: "deterministic", "stochastic", "encoder" (from the picture to noise) or "naive" (two
            evaluations a step, guided; the negative control).
        start_times: M, for a student that may also start at the times j/M; None: at the times of its own steps.
    """

    stage: str
    num_inference_steps: int | None
    w_min: float
    w_max: float
    guidance_scale: float
    teacher: str
    fingerprint: str
    format_version: int = 1
    kind: StudentKind = "deterministic"
    start_times: int | None = None

    def check(self, *, num_inference_steps: int, guidance_scale: float, extrapolate: bool = False) -> None:
        """Refuse a step count or guidance scale that the student was not trained for.

        Args:
            num_inference_steps: N.
            guidance_scale: g = 1 + w.
            extrapolate: take a guidance scale outside the trained range on purpose.

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
        if not extrapolate and not low - 1e-6 <= guidance_scale <= high + 1e-6:
            raise SamplingError(
                f"guidance_scale={guidance_scale:g} is outside {low:g} … {high:g}, the range that the student was "
                f"trained on (guidance_scale = 1 + w, w in {self.w_min:g} … {self.w_max:g})"
            )

    def steps_of_strength(self, strength: float) -> int:
        """Return how many of the student's N steps an image-to-image of this strength runs: N·strength.

        Raises:
            SamplingError: the strength is no multiple of 1/N (or of 1/M, with `start_times`), so that the student has
                no step that starts there; or it runs none.
        """
        N = self.num_inference_steps
        if N is None:
            raise SamplingError("a student of stage one has no steps of its own: give the number of steps to run")
        steps = strength * N
        if steps != steps or not 0 < strength <= 1 or abs(steps - round(steps)) > 1e-6 or round(steps) < 1:
            allowed = ", ".join(f"{i / N:g}" for i in range(1, N + 1))
            raise SamplingError(
                f"strength={strength:g} runs no whole number of this student's {N} steps: "
                f"it was made to start at those times alone. Strengths that work: {allowed}"
            )
        return round(steps)


def student_scheduler_config(
    teacher_config: dict[str, Any],
    *,
    prediction_type: PredictionType | None = None,
    kind: StudentKind = "deterministic",
) -> dict[str, Any]:
    """Return the scheduler configuration that samples a student exactly.

    On a discrete schedule it is DDIMScheduler's: trailing times, ending at alpha = 1; a stochastic student's is read by
    `StochasticDDIMScheduler` too. `steps_offset=1` has no effect with trailing spacing; StableDiffusionPipeline would
    overwrite another value with a warning.

    Args:
        teacher_config: the noise schedule stays the teacher's.
        prediction_type: what the student outputs; None: what its teacher does.
        kind: of the student.
    """
    own = {} if prediction_type is None else {"prediction_type": prediction_type}
    if teacher_config.get("_class_name") == CosineSchedule.scheduler_class_name:
        return {**teacher_config, **own, "stochastic": kind == "stochastic"}
    kept = ("prediction_type", *BETA_KEYS)
    return {
        "_class_name": "DDIMScheduler",
        "prediction_type": "epsilon",
        **{key: teacher_config[key] for key in kept if key in teacher_config},
        **own,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "clip_sample": False,
        "thresholding": False,
    }


def save_student(
    folder: Path | str,
    teacher: Parts,
    network: nn.Module,
    info: StudentInfo,
    *,
    prediction_type: PredictionType | None = None,
) -> None:
    """Write a student as a diffusers folder: the teacher's other parts (VAE, text encoder …), the student's network, a
    scheduler that samples it exactly, and `fewstep.json`.

    Args:
        folder: where to.
        teacher: the teacher's parts.
        network: the student's network.
        info: what it was made for.
        prediction_type: what it outputs; None: what its teacher does.
    """
    config = student_scheduler_config(teacher.scheduler_config, prediction_type=prediction_type, kind=info.kind)
    teacher.with_network(network, config).save(folder)
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
        given = {f.name: content[f.name] for f in fields(StudentInfo) if f.default is MISSING or f.name in content}
        info = StudentInfo(**given)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} is damaged ({error!r}): export the student again") from error
    if info.format_version != 1:
        raise ModelError(f"{file} has format_version={info.format_version}, this fewstep reads 1: update fewstep")
    return info
