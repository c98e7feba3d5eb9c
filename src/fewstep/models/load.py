"""Reading any model that is known here from a diffusers folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fewstep.errors import ModelError
from fewstep.models.class_conditional import load_class_conditional
from fewstep.models.dit import load_dit
from fewstep.models.inpainting import load_inpainting
from fewstep.models.parts import Parts
from fewstep.models.sdxl import SDXLParts, load_sdxl
from fewstep.models.text_latent import TextToImageParts, load_text_latent

#: What draws from a prompt alone.
TextToImageModel = TextToImageParts | SDXLParts

#: `_class_name` in model_index.json -> what reads such a folder.
_READERS: dict[str, Callable[..., Parts]] = {
    "ClassConditionalPipeline": load_class_conditional,
    "DiTPipeline": load_dit,
    "DiTStudentPipeline": load_dit,
    "StableDiffusionInpaintPipeline": load_inpainting,
    # Pipelines over one and the same parts; those that are no text-to-image model are told so.
    "StableDiffusionXLImg2ImgPipeline": load_sdxl,
    "StableDiffusionXLInpaintPipeline": load_sdxl,
    "StableDiffusionXLPipeline": load_sdxl,
}


def load_model(folder: Path | str, *, dtype: torch.dtype = torch.float32) -> Parts:
    """Read a model of any family from a diffusers folder, frozen and in evaluation mode, on the CPU.

    Raises:
        ModelError: the folder is none, or a part is missing, of another kind or damaged.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"{folder} is not a diffusers folder: it has no model_index.json. "
            "Save the teacher with pipeline.save_pretrained(FOLDER) and name that folder"
        )
    try:
        index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        # Pipelines of Stable Diffusion's parts come under many names (AltDiffusion's and LCM's among them).
        reader = _READERS.get(str(index.get("_class_name")), load_text_latent)
        parts = reader(folder, dtype=dtype)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the model folder {folder} cannot be read: {error}") from error
    return parts.freeze()


def load_parts(folder: Path | str, *, dtype: torch.dtype = torch.float32) -> TextToImageParts:
    """Read a latent text-to-image model from a diffusers folder, frozen and in evaluation mode, on the CPU.

    Raises:
        ModelError: see `load_model`; or the model is of another family.
    """
    parts = load_model(folder, dtype=dtype)
    if not isinstance(parts, TextToImageParts):
        raise ModelError(
            f"{folder} is a model of the family {parts.family}, and a text-to-image model of Stable Diffusion's kind "
            "is needed here"
        )
    return parts


def load_text_to_image(folder: Path | str, *, dtype: torch.dtype = torch.float32) -> TextToImageModel:
    """Read a model that draws from a prompt alone, frozen and in evaluation mode, on the CPU.

    Raises:
        ModelError: see `load_model`; or the model needs something else than a prompt.
    """
    parts = load_model(folder, dtype=dtype)
    if not isinstance(parts, TextToImageModel):
        raise ModelError(
            f"{folder} is a model of the family {parts.family}, which draws from more than a prompt or from none: "
            f"name one of the family {TextToImageParts.family} or {SDXLParts.family}"
        )
    return parts
