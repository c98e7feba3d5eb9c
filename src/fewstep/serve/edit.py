"""Pictures edited without a server, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fewstep.errors import SamplingError
from fewstep.models import Condition, Parts, SDXLParts, TextToImageParts, load_model, read_student_info
from fewstep.models.editing import LoadedModel, Weight, image_to_image, inpaint
from fewstep.models.inpainting import InpaintingParts
from fewstep.models.sampling import number_of_steps
from fewstep.models.translation import translate
from fewstep.serve.encode import Provenance
from fewstep.serve.files import default_device, default_guidance_scale, default_steps, write_images
from fewstep.serve.sample import EMPTY_PROMPT, weight_in_interval

_STRENGTH = 0.5


@dataclass(frozen=True)
class Edit:
    """What to do to a picture.

    Attributes:
        image: its file.
        strength: how far to go: t at which sampling begins; None: 0.5, or 1 for the hole of a mask.
        mask: file of a mask, white where the picture is drawn anew.
        keep_pixels: outside the mask put the picture's own pixels back, instead of what the autoencoder makes of them.
        from_prompt: what the picture shows, for a translation to what the prompt says.
        encoder: of a translation; None: the model itself, a teacher or a student of stage one.
        seed: of the first picture, one more for each next; None: 0. A translation draws nothing.
    """

    image: Path
    strength: float | None = None
    mask: Path | None = None
    keep_pixels: bool = False
    from_prompt: str | None = None
    encoder: LoadedModel | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for option, value in (("--strength", self.strength), ("--mask", self.mask), ("--seed", self.seed)):
            if self.from_prompt is not None and value is not None:
                raise SamplingError(
                    f"{option} has no effect with --from-prompt, which encodes the whole picture and draws no noise: "
                    "leave one of them out"
                )
        if self.keep_pixels and self.mask is None:
            raise SamplingError("--keep-pixels has no effect without --mask, which says where the picture stays")
        if self.encoder is not None and self.from_prompt is None:
            raise SamplingError("--encoder has no effect without --from-prompt, which says what the picture shows")


def load_for_editing(
    folder: Path,
    *,
    name: str,
    num_inference_steps: int | None = None,
    encoder: Path | None = None,
    encoder_name: str = "the encoder",
) -> tuple[LoadedModel, LoadedModel | None]:
    """Return the model that draws, and the one that encodes if there is one, on this machine's device.

    Args:
        folder: diffusers folder of the model.
        name: what it is called in messages.
        num_inference_steps: for a teacher (default 50) or a student of stage one; a student that was made for a number
            keeps to it.
        encoder, encoder_name: folder and name of what encodes.

    Raises:
        ModelError: a folder cannot be read.
        SamplingError: a student of stage one without a number, or a number that no model takes.
    """
    found = [(folder, name)] if encoder is None else [(folder, name), (encoder, encoder_name)]
    infos = [read_student_info(each) for each, _ in found]
    free = [info is None or info.num_inference_steps is None for info in infos]
    if not any(free):
        number_of_steps(infos[0], num_inference_steps)
    models = [
        LoadedModel(
            load_model(each).to(default_device()),
            info,
            default_steps(info, num_inference_steps, model=called) if takes_any else None,
        )
        for (each, called), info, takes_any in zip(found, infos, free, strict=True)
    ]
    return models[0], models[1] if encoder is not None else None


def save_edits(
    folder: Path,
    model: LoadedModel,
    edit: Edit,
    *,
    name: str,
    prompts: Sequence[str],
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    extrapolate: bool = False,
    batch_size: int = 8,
) -> list[Path]:
    """Write the edited picture as one PNG for each prompt, and return the files.

    Args:
        folder: made if need be.
        model: what draws.
        edit: the picture and what to do to it.
        name: of the model, written into the files.
        prompts: what to draw.
        guidance_scale: None takes the student's default (a teacher: 4).
        guidance_interval, extrapolate: as for `sample_images`.
        batch_size: pictures that go through the network at once.

    Raises:
        SamplingError: a file that is no picture of the right size, an option that has no effect, or what the model was
            not made for.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise SamplingError(EMPTY_PROMPT)
    _check_text_model(model.parts, name)
    g = default_guidance_scale(model.info, guidance_scale)
    if model.info is not None:
        model.info.check(num_inference_steps=model.steps, guidance_scale=g, extrapolate=extrapolate)
    w: Weight = g - 1
    if guidance_interval is not None:
        w = weight_in_interval(
            model.parts,
            model.info,
            guidance_scale=g,
            interval=guidance_interval,
            num_inference_steps=model.steps,
            extrapolate=extrapolate,
        )
    seeds = range(edit.seed or 0, (edit.seed or 0) + len(prompts))
    images: list[Image.Image] = []
    for first in range(0, len(prompts), batch_size):
        chunk = slice(first, first + batch_size)
        pixels = _edited(model, edit, prompts[chunk], seeds[chunk], w=w, name=name, extrapolate=extrapolate)
        images += [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]
    details = {"image": edit.image.name}
    if edit.from_prompt is not None:
        details["from_prompt"] = edit.from_prompt
    else:
        details["strength"] = format(_strength(edit), "g")
    if edit.mask is not None:
        details["mask"] = edit.mask.name
    if guidance_interval is not None:
        details["guidance_interval"] = "{:g} … {:g}".format(*guidance_interval)
    notes = [
        Provenance(prompt, seed, model.steps, g, name, details) for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return write_images(folder, images, notes)


def _edited(
    model: LoadedModel,
    edit: Edit,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    w: Weight,
    name: str,
    extrapolate: bool,
) -> Tensor:
    pictures = read_picture(edit.image, size=model.size).expand(len(prompts), -1, -1, -1)
    target = prompt_condition(model.parts, prompts)
    if edit.from_prompt is not None:
        encoder = edit.encoder or _own_encoder(model, name)
        _check_text_model(encoder.parts, "the encoder")
        return translate(
            encoder,
            model,
            pictures,
            source=prompt_condition(encoder.parts, [edit.from_prompt] * len(prompts)),
            target=target,
            w=w,
            # Inversion is best without guidance; a student begins where its training did.
            encoder_w=0.0 if encoder.info is None else max(0.0, encoder.info.w_min),
            extrapolate=extrapolate,
        )
    if edit.mask is None:
        return image_to_image(
            model, pictures, target, strength=_strength(edit), w=w, seeds=seeds, extrapolate=extrapolate
        )
    masks = read_mask(edit.mask, size=model.size).expand(len(prompts), -1, -1, -1)
    return inpaint(
        model,
        pictures,
        masks,
        target,
        strength=_strength(edit),
        w=w,
        seeds=seeds,
        keep_pixels=edit.keep_pixels,
        extrapolate=extrapolate,
    )


def _strength(edit: Edit) -> float:
    if edit.strength is not None:
        return edit.strength
    return _STRENGTH if edit.mask is None else 1.0


def _own_encoder(model: LoadedModel, name: str) -> LoadedModel:
    if model.info is not None and model.info.num_inference_steps is not None:
        raise SamplingError(
            f"{name} goes from noise to the picture alone, and --from-prompt needs the way back too: name an encoder "
            "student or a teacher of the same latents with --encoder"
        )
    return model


def prompt_condition(parts: Parts, prompts: Sequence[str]) -> Condition:
    """Return what a text model is told of prompts, without what an inpainting model is told of the hole."""
    if isinstance(parts, InpaintingParts):
        return {"text": parts.encode_prompts(prompts)}
    return parts.conditions([{"caption": prompt} for prompt in prompts])


def _check_text_model(parts: Parts, name: str) -> None:
    if not isinstance(parts, TextToImageParts | SDXLParts | InpaintingParts):
        raise SamplingError(f"{name} is a model of the family {parts.family}, which takes no prompt: name a text model")


def read_picture(file: Path, *, size: tuple[int, int]) -> Tensor:
    """Return a picture as uint8 (1, 3, H, W).

    Raises:
        SamplingError: it cannot be read, has another size, or is transparent somewhere.
    """
    image = _open(file, size=size, what="the picture")
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise SamplingError(f"the picture {file.name} is transparent in places: flatten it on a background first")
    return _tensor(image.convert("RGB"))


def read_mask(file: Path, *, size: tuple[int, int]) -> Tensor:
    """Return a mask as uint8 (1, 1, H, W).

    Raises:
        SamplingError: it cannot be read, has another size, or is in colour.
    """
    image = _open(file, size=size, what="the mask")
    grey = _tensor(image.convert("L"))
    if not torch.equal(grey.expand(-1, 3, -1, -1), _tensor(image.convert("RGB"))):
        raise SamplingError(f"the mask {file.name} is in colour: white is the hole and black what stays")
    return grey


def _open(file: Path, *, size: tuple[int, int], what: str) -> Image.Image:
    height, width = size
    try:
        image = Image.open(file)
        image.load()
    except (OSError, UnidentifiedImageError) as error:
        raise SamplingError(f"{what} {file} cannot be read: {error}") from error
    if image.size != (width, height):
        raise SamplingError(
            f"{what} {file.name} is {image.width} × {image.height} pixels, and this model draws {width} × {height}: "
            "resize or crop it to that first"
        )
    return image


def _tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image))
    return (pixels[..., None] if pixels.ndim == 2 else pixels).permute(2, 0, 1)[None].contiguous()
