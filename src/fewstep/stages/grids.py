"""Picture grids of students, for the eye."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from fewstep.data.part import stack_samples
from fewstep.diffusion import RowRandom, ddim, ddim_encode
from fewstep.distill.clean import draw_clean
from fewstep.models import Parts, initial_noise, load_model, read_student_info, sample_student
from fewstep.models.sampling import number_of_steps
from fewstep.stages.context import StageContext
from fewstep.stages.device import driver_device
from fewstep.stages.guidance import held_out_samples
from fewstep.tracking.fetch import fetch_model

_PICTURES = 16


def picture_grid(context: StageContext, student_uri: str) -> Image.Image:
    """Return 4 × 4 pictures of the first held-out conditions, each from its own fixed noise.

    An encoder's are what the teacher makes, in many steps, of the noise that it encodes the held-out pictures to.
    """
    device = driver_device(context.recipe.cluster)
    folder = fetch_model(student_uri, storage=context.storage)
    info = read_student_info(folder)
    assert info is not None  # our own export
    parts = load_model(folder).to(device)
    samples = held_out_samples(context, _PICTURES)
    batch = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in stack_samples(samples).items()
    }
    model = parts.denoiser()
    w = context.recipe.evaluate.guidance_scale - 1
    if info.w_min == info.w_max:
        w = info.w_min
    if info.kind == "encoder":
        random = RowRandom(seed=0, step=0, rows=range(len(samples)), device=device)
        noise = ddim_encode(
            model.conditional(model.condition_of(batch), max(0.0, info.w_min)),
            draw_clean(batch, random),
            schedule=model.schedule,
            prediction_type=model.prediction_type,
            num_inference_steps=number_of_steps(info, None),
        )
        model = load_model(context.fetch(context.teacher())).to(device).denoiser()
        z = ddim(
            model.guided(model.condition_of(batch), w),
            noise,
            schedule=model.schedule,
            prediction_type=model.prediction_type,
            num_inference_steps=context.recipe.evaluate.reference_steps,
        )
    else:
        z = sample_student(
            model,
            info,
            initial_noise(range(len(samples)), parts.sample_shape, device=device),
            model.condition_of(batch),
            w=w,
        )
    return _sheet(parts, z)


def _sheet(parts: Parts, z: Tensor) -> Image.Image:
    pictures = parts.decode(z).permute(0, 2, 3, 1).cpu()
    height, width = pictures.shape[1:3]
    sheet = Image.new("RGB", (4 * width, 4 * height), "white")
    for number, picture in enumerate(pictures):
        shown = picture.expand(-1, -1, 3) if picture.shape[2] == 1 else picture
        place = (number % 4 * width, number // 4 * height)
        sheet.paste(Image.fromarray(torch.as_tensor(shown).contiguous().numpy()), place)
    return sheet
