"""Pictures changed by a model without further training: image-to-image and inpainting.

Everything takes and returns pictures as uint8 tensors (B, C, H, W) of the model's own size. Where diffusers has a
pipeline for it (`StableDiffusionImg2ImgPipeline`, `StableDiffusionInpaintPipeline`) a seed gives the picture that it
gives with `generator=[torch.Generator().manual_seed(seed)]`: the random numbers are drawn in its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.diffusion.guidance import WeightSchedule
from fewstep.diffusion.samplers import Callback
from fewstep.errors import SamplingError
from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.inpainting import InpaintingParts
from fewstep.models.parts import Parts
from fewstep.models.sampling import SeededNoise, number_of_steps, sample_student
from fewstep.models.student import StudentInfo, start_of_strength

#: Guidance weight: a number, one a picture (B,), or w(t).
Weight = Tensor | float | WeightSchedule


@dataclass(frozen=True)
class LoadedModel:
    """A model, what it was made for, and the steps that it is run with.

    Attributes:
        parts: the networks.
        info: what the student was made for; None for a teacher.
        num_inference_steps: None for a student of its own number of steps.
    """

    parts: Parts
    info: StudentInfo | None = None
    num_inference_steps: int | None = None

    @cached_property
    def denoiser(self) -> Denoiser:
        """The network with all that belongs to calling it."""
        return self.parts.denoiser()

    @property
    def steps(self) -> int:
        """Steps of a run from noise.

        Raises:
            SamplingError: no number is known, or one that the student was not made for.
        """
        return number_of_steps(self.info, self.num_inference_steps)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of its pictures in pixels."""
        _, height, width = self.parts.sample_shape
        return self.parts.resolution, self.parts.resolution * width // height

    def start(self, strength: float) -> Fraction:
        """Return the t at which an editing of this strength begins.

        Raises:
            SamplingError: the model has no step that begins there; the message has the strengths that work.
        """
        if self.info is not None and self.info.num_inference_steps is not None:
            return self.info.start_of_strength(strength)
        return start_of_strength(strength, self.steps, what=f"sampling with {self.steps} steps")

    def check_pictures(self, pictures: Tensor) -> None:
        """Refuse what is not a batch of uint8 pictures of the model's size.

        Raises:
            SamplingError: saying which size.
        """
        wanted = (self.parts.picture_channels, *self.size)
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or tuple(pictures.shape[1:]) != wanted:
            channels, height, width = wanted
            raise SamplingError(
                f"the pictures are {_words(pictures)}, and this model takes uint8 (B, {channels}, {height}, {width}): "
                f"resize or crop them to {width} × {height} pixels first"
            )

    def check_condition(self, condition: Condition, *, rows: int, given: tuple[str, ...] = ()) -> None:
        """Refuse a condition that lacks a part, or has another number of rows than there are pictures.

        Args:
            condition: what the network is told.
            rows: number of pictures.
            given: parts that are not the caller's to give.

        Raises:
            SamplingError: naming the part.
        """
        for name in self.denoiser.condition_names:
            if name not in condition and name not in given:
                hint = " (it is an inpainting model: give a mask)" if name == "mask" else ""
                raise SamplingError(
                    f"the condition has {', '.join(condition) or 'nothing'}, and this model needs {name} too{hint}"
                )
        for name, value in condition.items():
            if len(value) != rows:
                raise SamplingError(f"{rows} pictures but {len(value)} rows of the condition {name}: give one for each")

    def check_weight(self, w: Weight, *, extrapolate: bool) -> None:
        """Refuse a guidance weight that the student was not made for: a number, one of several, or of a schedule's at
        the times of its steps.

        Raises:
            SamplingError: naming the range.
        """
        if self.info is None:
            return
        if callable(w):
            schedule = self.denoiser.schedule
            w = w(schedule.fraction(schedule.times(self.steps)[1:]))
        # The largest last: the first that is outside is the one that is named.
        for weight in [float(w.min()), float(w.max())] if isinstance(w, Tensor) else [w]:
            self.info.check(num_inference_steps=self.steps, guidance_scale=1 + weight, extrapolate=extrapolate)


@torch.no_grad()
def image_to_image(
    model: LoadedModel,
    pictures: Tensor,
    condition: Condition,
    *,
    strength: float,
    w: Weight,
    seeds: Sequence[int],
    extrapolate: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Return pictures drawn over others (SDEdit; Meng et al. §4.2.3): noised to t = strength and sampled from there.

    Args:
        model: a deterministic or stochastic student, or a teacher.
        pictures: (B, C, H, W) uint8.
        condition: what to draw, B rows.
        strength: t in (0, 1] at which sampling begins: a time that the model starts a step from. The higher, the more
            it follows the condition and the less the picture.
        w: guidance weight.
        seeds: one a picture.
        extrapolate: take a weight outside the trained range on purpose.
        callback: called after each step.

    Raises:
        SamplingError: pictures of another size, a strength that no step begins at, a weight or a kind of student that
            cannot do it.
    """
    _check_decoder(model, "image-to-image")
    model.check_pictures(pictures)
    model.check_weight(w, extrapolate=extrapolate)
    model.check_condition(condition, rows=len(pictures))
    _check_seeds(seeds, rows=len(pictures))
    start = model.start(strength)
    denoiser = model.denoiser
    noise = SeededNoise(seeds, model.parts.sample_shape, device=model.parts.device)
    x = _clean(model.parts, pictures, noise)
    z = denoiser.schedule.noise(x, noise.draw(), _time(denoiser, start, x))
    z = sample_student(
        denoiser,
        model.info,
        z,
        condition,
        w=w,
        noise=lambda step: noise.draw(),
        num_inference_steps=model.num_inference_steps,
        start=start,
        callback=callback,
    )
    return model.parts.decode(z)


@torch.no_grad()
def inpaint(
    model: LoadedModel,
    pictures: Tensor,
    masks: Tensor,
    condition: Condition,
    *,
    w: Weight,
    seeds: Sequence[int],
    strength: float = 1.0,
    keep_pixels: bool = False,
    extrapolate: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Return pictures whose holes are drawn anew (Meng et al. §4.2.4) and whose rest stays.

    An inpainting model is told hole and masked picture (the mean of its latents, as in training; diffusers draws them).
    Any other model paints with what is known put back after each step, noised to the next time: not the paper's way,
    but one that needs no training. A latent belongs to the hole when its upper left pixel does, as in diffusers. What
    stays are latents: a decoder that looks at the whole picture may tint their pixels, unless `keep_pixels`.

    Args:
        model, pictures, w, seeds, extrapolate, callback: as for `image_to_image`.
        masks: (B, 1, H, W), the hole: bool, or uint8 of 0 and 255.
        condition: what to draw, B rows, of an inpainting model only what it is told beside mask and masked picture.
        strength: t at which sampling begins; at 1 from noise alone.
        keep_pixels: put the pictures' own pixels back outside the hole, seams or not.

    Raises:
        SamplingError: as for `image_to_image`; or a mask of another size, not binary, or without a hole.
    """
    _check_decoder(model, "inpainting")
    model.check_pictures(pictures)
    model.check_weight(w, extrapolate=extrapolate)
    holes = _holes(pictures, masks)
    model.check_condition(condition, rows=len(pictures), given=("mask", "masked_latents"))
    _check_seeds(seeds, rows=len(pictures))
    start = model.start(strength)
    parts, denoiser = model.parts, model.denoiser
    noise = SeededNoise(seeds, parts.sample_shape, device=parts.device)
    small = F.interpolate(holes.float(), size=parts.sample_shape[1:]).to(parts.device) > 0
    if not small.flatten(1).any(1).all():
        raise SamplingError(
            "a mask has no hole left at the size of the latents, so nothing would be drawn: make its hole larger"
        )
    constrain = None
    # Drawn in the order of diffusers' pipeline, which encodes the whole picture only where it needs it.
    if isinstance(parts, InpaintingParts):
        x = None if start == 1 else _clean(parts, pictures, noise)
        eps = noise.draw()
        condition = {**condition, **parts.encode_holes(pictures, holes)}
    else:
        x = known = _clean(parts, pictures, noise)
        eps = noise.draw()

        def constrain(z: Tensor, time: Tensor) -> Tensor:
            return torch.where(small, z, denoiser.schedule.noise(known, eps, time))

    z = eps if x is None or start == 1 else denoiser.schedule.noise(x, eps, _time(denoiser, start, x))
    z = sample_student(
        denoiser,
        model.info,
        z,
        condition,
        w=w,
        noise=lambda step: noise.draw(),
        num_inference_steps=model.num_inference_steps,
        start=start,
        constrain=constrain,
        callback=callback,
    )
    drawn = parts.decode(z)
    return torch.where(holes.to(drawn.device), drawn, pictures.to(drawn.device)) if keep_pixels else drawn


def _clean(parts: Parts, pictures: Tensor, noise: SeededNoise) -> Tensor:
    mean, std = parts.encode_pictures(pictures)
    return mean + std * noise.draw()


def _time(denoiser: Denoiser, t: Fraction, z: Tensor) -> Tensor:
    """Return t as the schedule counts it, (B,)."""
    return denoiser.schedule.times(t.denominator)[t.numerator].to(z.device).expand(len(z))


def _check_seeds(seeds: Sequence[int], *, rows: int) -> None:
    if len(seeds) != rows:
        raise SamplingError(f"{rows} pictures but {len(seeds)} seeds: give one for each")


def _check_decoder(model: LoadedModel, use: str) -> None:
    if model.info is not None:
        model.info.check_kind(use, "deterministic", "stochastic")


def _holes(pictures: Tensor, masks: Tensor) -> Tensor:
    """Return the masks as bool, (B, 1, H, W), on the pictures' device."""
    wanted = (len(pictures), 1, *pictures.shape[2:])
    if tuple(masks.shape) != wanted or masks.dtype not in (torch.bool, torch.uint8):
        raise SamplingError(
            f"the masks are {_words(masks)}, and these pictures need bool or uint8 {wanted}: a mask has one channel "
            "and its picture's height and width"
        )
    holes = masks.to(pictures.device) > 0
    if masks.dtype == torch.uint8:
        grey = masks[(masks != 0) & (masks != 255)]
        if len(grey):
            raise SamplingError(
                f"a mask has the value {int(grey[0])}: 255 is the hole and 0 what stays, nothing between; "
                "threshold it first"
            )
    if not holes.flatten(1).any(1).all():
        raise SamplingError("a mask has no hole: set to 255 what is to be drawn anew")
    return holes


def _words(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


__all__ = ["LoadedModel", "Weight", "image_to_image", "inpaint"]
