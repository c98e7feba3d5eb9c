"""The student: the teacher's network with the guidance weight as a further input, and the folder that it ships in."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import MISSING, asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from diffusers.models import DiTTransformer2DModel, UNet2DConditionModel
from torch import nn

from fewstep.diffusion.cosine import CosineSchedule
from fewstep.diffusion.prediction import PredictionType
from fewstep.diffusion.schedule import BETA_KEYS
from fewstep.errors import ModelError, SamplingError
from fewstep.models.architecture import unet_like
from fewstep.models.parts import Parts

INFO_FILE = "fewstep.json"

#: What can be distilled; a DiT as `ConditionedDiT` is.
Network: TypeAlias = UNet2DConditionModel | DiTTransformer2DModel

#: How a student is sampled.
StudentKind = Literal["deterministic", "stochastic", "encoder", "naive"]

_WHAT_KINDS_DO = {
    "deterministic": "goes from noise to the picture, the same way each time",
    "stochastic": "goes from noise to the picture, with fresh noise in every step",
    "encoder": "goes from the picture to noise",
    "naive": "is the paper's negative control and still needs guidance, two evaluations a step",
}

#: Longest list of strengths in a message.
_LISTED_STRENGTHS = 16


def make_student(teacher: Network, *, embedding_dim: int | None = 256) -> Network:
    """Return a w-conditioned copy of a teacher's denoising network, trainable.

    The new weights, a `cond_proj` beside the embedding of the time (in a DiT one in each block), start at zero: at
    initialisation the student equals the conditional teacher bit for bit, whatever w. The teacher's dropout is off.

    Args:
        teacher: a U-Net or a ConditionedDiT that is sampled with classifier-free guidance.
        embedding_dim: width of the w embedding; None: no input for w, for a student of one single w.

    Raises:
        ModelError: the teacher already takes a guidance weight.
    """
    conditioned = teacher.config["time_cond_proj_dim"]
    if conditioned is not None:
        raise ModelError(
            f"the teacher is already conditioned on w (its network has time_cond_proj_dim={conditioned}): "
            "stage one needs a model that is sampled with classifier-free guidance"
        )
    student = unet_like(teacher, time_cond_proj_dim=embedding_dim, dropout=0.0)
    fresh = student.state_dict().items()
    new = {name: torch.zeros_like(weight) for name, weight in fresh if name.endswith("cond_proj.weight")}
    student.load_state_dict({**teacher.state_dict(), **new})
    return student.train()


def copy_unet(unet: Network) -> Network:
    """Return a trainable copy of a U-Net or a ConditionedDiT with the same weights, without dropout."""
    copy = unet_like(unet, dropout=0.0)
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
        kind: how it is sampled: "deterministic", "stochastic", "encoder" (from the picture to noise) or "naive" (two
            evaluations a step, guided; the negative control).
        start_times: M, for a student that may also start at the times j/M; None: at the times of its own steps.
        lora_base: URI of the model that the adapters in its folder belong on (`models/lora.py`); None: it has none.
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
    lora_base: str | None = None

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
        inside = low - 1e-6 <= guidance_scale <= high + 1e-6
        if not inside and self.has_single_w:
            # Nothing to extrapolate: the network has no input for w.
            raise SamplingError(
                f"guidance_scale={guidance_scale:g} has no effect on this student, which was made for the one weight "
                f"w = {self.w_min:g}: use {low:g} or leave it out"
            )
        if not extrapolate and not inside:
            raise SamplingError(
                f"guidance_scale={guidance_scale:g} is outside {low:g} … {high:g}, the range that the student was "
                f"trained on (guidance_scale = 1 + w, w in {self.w_min:g} … {self.w_max:g}): choose one in it, "
                "or extrapolate on purpose (--extrapolate)"
            )

    @property
    def has_single_w(self) -> bool:
        """Whether its guidance weight is built in: no input for w and no unconditional branch."""
        return self.w_min == self.w_max and self.kind != "naive"

    def check_kind(self, use: str, *allowed: StudentKind) -> None:
        """Refuse a student that is sampled in another way than a use needs.

        Args:
            use: the use, in words.
            allowed: kinds that can do it.

        Raises:
            SamplingError: naming the kind and what it does.
        """
        if self.kind not in allowed:
            raise SamplingError(
                f"this student is of the kind {self.kind}, which {_WHAT_KINDS_DO[self.kind]}: {use} needs one that is "
                f"{' or '.join(allowed)}"
            )

    def start_of_strength(self, strength: float) -> Fraction:
        """Return the t at which an image-to-image of this strength begins: a time that the student starts from.

        Raises:
            SamplingError: the strength is no multiple of 1/N (or of 1/M, with `start_times`), so that the student has
                no step that starts there; or it runs none.
        """
        if self.num_inference_steps is None:
            raise SamplingError("a student of stage one has no steps of its own: give the number of steps to run")
        return start_of_strength(strength, self.start_times or self.num_inference_steps, what="this student")

    def steps_of_strength(self, strength: float) -> int:
        """Return how many steps an image-to-image of this strength runs: N·strength, rounded up.

        Raises:
            SamplingError: as `start_of_strength`.
        """
        start = self.start_of_strength(strength)
        assert self.num_inference_steps is not None
        return math.ceil(start * self.num_inference_steps)


def start_of_strength(strength: float, num_starts: int, *, what: str) -> Fraction:
    """Return the strength as a multiple of 1/num_starts.

    Args:
        strength: of an image-to-image, the t at which it begins.
        num_starts: how many times in (0, 1] sampling can begin at.
        what: that is sampled, in words.

    Raises:
        SamplingError: it is none, or not within (0, 1]; the message has the strengths that work.
    """
    begin = strength * num_starts
    # NaN fails every comparison. Strengths are written with few digits: 0.333333 is a third.
    if not (0 < strength <= 1 and abs(begin - round(begin)) < 1e-3 and round(begin) >= 1):
        allowed = [f"{i / num_starts:g}" for i in range(1, num_starts + 1)]
        if len(allowed) > _LISTED_STRENGTHS:
            allowed = [*allowed[:3], "…", allowed[-1]]
        raise SamplingError(
            f"strength={strength:g} is no time that {what} can begin at (one below 1/{num_starts} would run no step). "
            f"Strengths that work: {', '.join(allowed)}"
        )
    return Fraction(round(begin), num_starts)


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
