"""Pictures encoded to noise and decoded again: translation between conditions (style transfer), and its error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.samplers import ddim_encode
from fewstep.errors import SamplingError
from fewstep.models.denoiser import Condition
from fewstep.models.editing import LoadedModel, Weight
from fewstep.models.sampling import is_guided, sample_student


@torch.no_grad()
def encode(
    model: LoadedModel, pictures: Tensor, condition: Condition, *, w: Weight = 0.0, extrapolate: bool = False
) -> Tensor:
    """Return the noise that a sampler turns into these pictures, (B, C, h, w) (Meng et al. §4.3, `ddim_encode`).

    Args:
        model: an encoder student; or a teacher, or a student of stage one, which take any number of steps.
        pictures: (B, C, H, W) uint8.
        condition: what they show, B rows.
        w: guidance weight; above 0 the errors of inversion grow with it.
        extrapolate: take a weight outside the trained range on purpose.

    Raises:
        SamplingError: a student that goes the other way, pictures of another size, or a model without v-prediction.
    """
    if model.info is not None and model.info.num_inference_steps is not None:
        model.info.check_kind("encoding pictures", "encoder")
    model.check_pictures(pictures)
    model.check_weight(w, extrapolate=extrapolate)
    model.check_condition(condition, rows=len(pictures))
    return _encode(model, model.parts.encode_pictures(pictures)[0], condition, w)


@torch.no_grad()
def translate(
    encoder: LoadedModel,
    decoder: LoadedModel,
    pictures: Tensor,
    *,
    source: Condition,
    target: Condition,
    w: Weight,
    encoder_w: Weight = 0.0,
    extrapolate: bool = False,
) -> Tensor:
    """Return pictures of one condition made into another: encoded to noise under the first, decoded under the second
    (style transfer, Meng et al. §4.3; Su et al. 2023, dual diffusion implicit bridges).

    Args:
        encoder: as for `encode`.
        decoder: a deterministic student, or a teacher.
        pictures: (B, C, H, W) uint8.
        source: what they show, B rows of the encoder's condition.
        target: what they are to become, B rows of the decoder's.
        w: guidance weight of the decoder.
        encoder_w: of the encoder.
        extrapolate: take weights outside the trained ranges on purpose.

    Raises:
        SamplingError: as for `encode`; or a decoder that is none, or diffuses something of another shape.
    """
    _check_decoder(encoder, decoder, target, w, rows=len(pictures), extrapolate=extrapolate)
    noise = encode(encoder, pictures, source, w=encoder_w, extrapolate=extrapolate)
    return decoder.parts.decode(_decode(decoder, noise, target, w))


@dataclass(frozen=True)
class RoundTrip:
    """What is left of pictures that were encoded to noise and decoded again.

    Attributes:
        pictures: (B, C, H, W) uint8.
        relative_error: |x' − x|/|x| of what is diffused, (B,): the samplers' part alone.
        pixel_mse: mean squared error of the pictures with pixels in [0, 1], (B,): with the autoencoder's part.
    """

    pictures: Tensor
    relative_error: Tensor
    pixel_mse: Tensor


@torch.no_grad()
def round_trip(
    encoder: LoadedModel,
    decoder: LoadedModel,
    pictures: Tensor,
    *,
    source: Condition,
    target: Condition,
    w: Weight = 0.0,
    encoder_w: Weight = 0.0,
    extrapolate: bool = False,
) -> RoundTrip:
    """Return pictures encoded to noise and decoded again, and how far they are from what they were: the error of the
    pair's discretisation, the natural measure of an encoder.

    Args:
        encoder, decoder, pictures, w, encoder_w, extrapolate: as for `translate`.
        source, target: one and the same condition, as the encoder and as the decoder are told it.

    Raises:
        SamplingError: as for `translate`.
    """
    _check_decoder(encoder, decoder, target, w, rows=len(pictures), extrapolate=extrapolate)
    noise = encode(encoder, pictures, source, w=encoder_w, extrapolate=extrapolate)
    x = encoder.parts.encode_pictures(pictures)[0]
    back = _decode(decoder, noise, target, w)
    again = decoder.parts.decode(back)
    difference = (again.cpu().float() - pictures.cpu().float()) / 255
    return RoundTrip(
        pictures=again,
        relative_error=(back.to(x.device) - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1),
        pixel_mse=difference.square().flatten(1).mean(1),
    )


def _encode(model: LoadedModel, x: Tensor, condition: Condition, w: Weight) -> Tensor:
    denoiser = model.denoiser
    takes_weight = denoiser.embedding_dim is not None
    # At w = 0 the guided network is its conditional branch, for half the evaluations.
    guided = is_guided(model.info, takes_weight=takes_weight) and not (isinstance(w, float | int) and w == 0)
    return ddim_encode(
        denoiser.guided(condition, w) if guided else denoiser.conditional(condition, w),
        x,
        schedule=denoiser.schedule,
        prediction_type=denoiser.prediction_type,
        num_inference_steps=model.steps,
    )


def _decode(model: LoadedModel, noise: Tensor, condition: Condition, w: Weight) -> Tensor:
    return sample_student(
        model.denoiser,
        model.info,
        noise.to(model.parts.device),
        condition,
        w=w,
        num_inference_steps=model.num_inference_steps,
    )


def _check_decoder(
    encoder: LoadedModel, decoder: LoadedModel, target: Condition, w: Weight, *, rows: int, extrapolate: bool
) -> None:
    if decoder.info is not None:
        # Fresh noise in every step would paint over what was encoded.
        decoder.info.check_kind("decoding what was encoded", "deterministic")
    decoder.check_weight(w, extrapolate=extrapolate)
    decoder.check_condition(target, rows=rows)
    if encoder.parts.sample_shape != decoder.parts.sample_shape:
        raise SamplingError(
            f"the encoder's noise is {encoder.parts.sample_shape} and the decoder's {decoder.parts.sample_shape}: take "
            "two models whose (channels, height, width) are the same"
        )
