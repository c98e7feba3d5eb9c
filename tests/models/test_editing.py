"""Image-to-image and inpainting: what diffusers' pipelines do, what each kind of model can, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image
from torch import Tensor

from edited import INFO, PROMPTS, pixel_classes, said, told
from fewstep.data.emoji import EmojiSettings, emoji_samples
from fewstep.diffusion import ddim, ddim_step, interval_weight, stochastic
from fewstep.diffusion.samplers import SamplerStep
from fewstep.diffusion.schedulers import StochasticDDIMScheduler
from fewstep.errors import SamplingError
from fewstep.models import (
    SeededNoise,
    load_parts,
    read_student_info,
)
from fewstep.models.editing import LoadedModel, image_to_image, inpaint
from fewstep.models.inpainting import add_inpainting
from fewstep.tracking.fetch import packaged_model

SEEDS = [3, 11]


@pytest.fixture(scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def masks() -> Tensor:
    holes = torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    holes[0, :, 4:12, 8:] = 255
    holes[1, :, :7, 3:14] = 255  # off the latents' grid
    return holes


def pil(batch: Tensor) -> list[Image.Image]:
    return [Image.fromarray(row.permute(1, 2, 0).squeeze(-1).numpy()) for row in batch]


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


class Watch:
    """A callback that keeps the times and the last state."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, step: SamplerStep) -> None:
        self.times.append(step.index)
        self.z = step.z


def stock(kind: Any, parts: Any, **arguments: Any) -> Tensor:
    """Latents of an unmodified diffusers pipeline over the same networks."""
    pipeline = kind.from_pipe(parts.pipeline())
    if "scheduler" in arguments:
        pipeline.scheduler = arguments.pop("scheduler").from_config(parts.scheduler_config)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipeline(
            PROMPTS,
            guidance_scale=4.0,
            num_inference_steps=4,
            generator=generators(),
            output_type="latent",
            **arguments,
        ).images


@pytest.mark.parametrize("kind", ["deterministic", "stochastic"])
@pytest.mark.parametrize("strength", [0.25, 0.5, 0.75, 1.0])
def test_image_to_image_is_the_stock_pipelines(
    student: LoadedModel, pictures: Tensor, strength: float, kind: str
) -> None:
    more = {"scheduler": StochasticDDIMScheduler} if kind == "stochastic" else {}
    theirs = stock(StableDiffusionImg2ImgPipeline, student.parts, image=pil(pictures), strength=strength, **more)
    watch, model = Watch(), said(student, kind=kind)
    ours = image_to_image(model, pictures, told(model), strength=strength, w=3.0, seeds=SEEDS, callback=watch)
    assert len(watch.times) == 4 * strength
    torch.testing.assert_close(watch.z, theirs, rtol=0, atol=1e-5)
    assert torch.equal(ours, student.parts.decode(watch.z))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_by_blending_is_the_stock_pipelines(
    student: LoadedModel, pictures: Tensor, masks: Tensor, strength: float
) -> None:
    theirs = stock(
        StableDiffusionInpaintPipeline,
        student.parts,
        image=pil(pictures),
        mask_image=pil(masks),
        strength=strength,
        height=16,
        width=16,
    )
    watch = Watch()
    inpaint(student, pictures, masks, told(student), strength=strength, w=3.0, seeds=SEEDS, callback=watch)
    torch.testing.assert_close(watch.z, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_an_inpainting_student_is_the_stock_pipelines(
    student: LoadedModel, pictures: Tensor, masks: Tensor, strength: float
) -> None:
    parts = add_inpainting(student.parts)
    torch.manual_seed(5)
    torch.nn.init.normal_(parts.unet.conv_in.weight, std=0.2)
    around = parts.encode_holes(pictures, masks > 0)["masked_latents"]
    theirs = stock(
        StableDiffusionInpaintPipeline,
        parts,
        image=pil(pictures),
        mask_image=pil(masks),
        masked_image_latents=around,
        strength=strength,
        height=16,
        width=16,
    )
    model, watch = LoadedModel(parts, student.info), Watch()
    condition = {"text": parts.encode_prompts(PROMPTS)}
    inpaint(model, pictures, masks, condition, strength=strength, w=3.0, seeds=SEEDS, callback=watch)
    torch.testing.assert_close(watch.z, theirs, rtol=0, atol=1e-5)
    with pytest.raises(SamplingError, match=r"needs mask too .*inpainting model: give a mask"):
        image_to_image(model, pictures, condition, strength=0.5, w=3.0, seeds=SEEDS)


def test_a_seed_is_its_pictures_own(student: LoadedModel, pictures: Tensor, masks: Tensor) -> None:
    for kind in ("deterministic", "stochastic"):
        model = said(student, kind=kind)
        both = inpaint(model, pictures, masks, told(model), w=3.0, seeds=SEEDS)
        alone = inpaint(model, pictures[1:], masks[1:] > 0, told(model, PROMPTS[1:]), w=3.0, seeds=SEEDS[1:])
        assert int((both[1].int() - alone[0].int()).abs().max()) <= 1
        other = inpaint(model, pictures, masks, told(model), w=3.0, seeds=[4, 5])
        assert not torch.equal(both, other)


def test_pixels_around_the_hole_can_be_kept(student: LoadedModel, pictures: Tensor, masks: Tensor) -> None:
    drawn = inpaint(student, pictures, masks, told(student), w=3.0, seeds=SEEDS)
    kept = inpaint(student, pictures, masks, told(student), w=3.0, seeds=SEEDS, keep_pixels=True)
    holes = (masks > 0).expand_as(pictures)
    assert torch.equal(kept[~holes], pictures[~holes])
    assert torch.equal(kept[holes], drawn[holes])


def test_a_teacher_is_guided(student: LoadedModel, teacher: Any, pictures: Tensor) -> None:
    calls: list[int] = []
    hook = teacher.unet.register_forward_hook(lambda m, a, out: calls.append(len(a[0])))
    image_to_image(
        LoadedModel(teacher, None, 8), pictures, told(LoadedModel(teacher)), strength=0.25, w=2.0, seeds=SEEDS
    )
    hook.remove()
    assert calls == [4, 4]
    with pytest.raises(SamplingError, match="any number of steps: name one"):
        image_to_image(LoadedModel(teacher), pictures, told(student), strength=0.5, w=2.0, seeds=SEEDS)
    with pytest.raises(SamplingError, match=r"sampling with 50 steps can begin.* 0.02, 0.04, 0.06, …, 1$"):
        image_to_image(LoadedModel(teacher, None, 50), pictures, told(student), strength=0.01, w=2.0, seeds=SEEDS)


@pytest.mark.parametrize(
    ("steps", "strength", "places"),
    [
        (1, 0.25, [1, 0]),
        (1, 0.75, [3, 0]),
        (2, 0.25, [1, 0]),
        (2, 0.5, [2, 0]),
        (2, 0.75, [3, 1, 0]),
        (2, 1, [4, 2, 0]),
    ],
)
def test_extra_start_times_jump_a_whole_step_from_there(
    student: LoadedModel, pictures: Tensor, steps: int, strength: float, places: list[int]
) -> None:
    model, watch = said(student, num_inference_steps=steps, start_times=4), Watch()
    assert model.info is not None
    assert model.info.steps_of_strength(strength) == len(places) - 1
    image_to_image(model, pictures, told(model), strength=strength, w=3.0, seeds=SEEDS, callback=watch)
    assert watch.times == [250 * place - 1 for place in places[:-1]]
    denoiser, noise = model.denoiser, SeededNoise(SEEDS, (4, 4, 4))
    mean, std = model.parts.encode_pictures(pictures)
    x, schedule = mean + std * noise.draw(), denoiser.schedule
    index = [torch.full((2,), 250 * place - 1) for place in places]
    z = schedule.noise(x, noise.draw(), index[0])
    network = denoiser.conditional(told(model), 3.0)
    with torch.no_grad():
        for t, s in pairwise(index):
            z = ddim_step(network(z, t), z, *schedule.alpha_sigma(t), *schedule.alpha_sigma(s), "v_prediction")
    torch.testing.assert_close(watch.z, z, rtol=0, atol=1e-5)


def test_a_start_on_the_grid_is_the_last_steps(student: LoadedModel) -> None:
    model, z = student.denoiser, torch.randn(2, 4, 4, 4)
    network = model.conditional(told(student), 3.0)
    common: Any = {
        "schedule": model.schedule,
        "prediction_type": "v_prediction",
        "num_inference_steps": 4,
    }
    two = ddim(network, z, steps_to_run=2, **common)
    assert torch.equal(ddim(network, z, start=Fraction(1, 2), **common), two)
    seen: list[Tensor] = []

    def keep(state: Tensor, time: Tensor) -> Tensor:
        seen.append(time)
        return state

    def noise(step: int) -> Tensor:
        return torch.randn(z.shape, generator=torch.Generator().manual_seed(step))

    whole = stochastic(network, z, noise=noise, constrain=keep, **common)
    assert [int(time[0]) for time in seen] == [749, 499, 249, -1]
    assert torch.equal(whole, stochastic(network, z, noise=noise, steps_to_run=4, **common))
    assert torch.equal(
        stochastic(network, z, noise=noise, steps_to_run=1, **common), ddim(network, z, steps_to_run=1, **common)
    )
    with pytest.raises(SamplingError, match="start=3/2"):
        ddim(network, z, start=Fraction(3, 2), **common)
    with pytest.raises(SamplingError, match="5 of 4 steps cannot be run"):
        stochastic(network, z, noise=noise, steps_to_run=5, **common)


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.3, 0.55, 1.25, -0.25, float("nan")])
def test_a_strength_between_the_steps_is_refused_with_those_that_work(
    student: LoadedModel, pictures: Tensor, masks: Tensor, strength: float
) -> None:
    with pytest.raises(SamplingError, match=r"Strengths that work: 0\.25, 0\.5, 0\.75, 1$"):
        image_to_image(student, pictures, told(student), strength=strength, w=3.0, seeds=SEEDS)
    with pytest.raises(SamplingError, match=r"Strengths that work: 0\.25, 0\.5, 0\.75, 1$"):
        inpaint(student, pictures, masks, told(student), strength=strength, w=3.0, seeds=SEEDS)


def test_strengths_of_other_students() -> None:
    thirds = replace(INFO, num_inference_steps=3)
    assert (thirds.start_of_strength(0.333333), thirds.steps_of_strength(2 / 3)) == (Fraction(1, 3), 2)
    one = replace(INFO, num_inference_steps=1)
    with pytest.raises(SamplingError, match=r"below 1/1 would run no step.*Strengths that work: 1$"):
        one.start_of_strength(0.5)
    assert replace(one, start_times=4).steps_of_strength(0.5) == 1
    with pytest.raises(SamplingError, match="give the number of steps"):
        replace(INFO, stage="guidance", num_inference_steps=None).start_of_strength(0.5)


Change = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: {"pictures": a["pictures"].float()}, r"float32 \(2, 3, 16, 16\).*takes uint8"),
        (lambda a: {"pictures": a["pictures"][:, :1]}, r"uint8 \(2, 1, 16, 16\)"),
        (lambda a: {"pictures": a["pictures"].repeat(1, 1, 2, 2)}, "resize or crop them to 16 × 16 pixels"),
        (lambda a: {"pictures": a["pictures"][0]}, r"uint8 \(3, 16, 16\)"),
        (lambda a: {"masks": a["masks"][:, :, :8]}, r"masks are uint8 \(2, 1, 8, 16\).*picture's height and width"),
        (lambda a: {"masks": a["masks"][:1]}, r"need bool or uint8 \(2, 1, 16, 16\)"),
        (lambda a: {"masks": a["masks"].float()}, "masks are float32"),
        (lambda a: {"masks": a["masks"] // 2}, "the value 127: 255 is the hole and 0 what stays"),
        (lambda a: {"masks": torch.zeros_like(a["masks"])}, "a mask has no hole: set to 255"),
        (lambda a: {"masks": one_pixel(a["masks"])}, "no hole left at the size of the latents"),
        (lambda a: {"condition": {"text": a["condition"]["text"][:1]}}, "2 pictures but 1 rows of the condition text"),
        (lambda a: {"condition": {}}, "the condition has nothing, and this model needs text too"),
        (lambda a: {"seeds": [1]}, "2 pictures but 1 seeds"),
        (lambda a: {"w": 7.0}, r"guidance_scale=8 is outside 1 … 7"),
        (lambda a: {"model": said(a["model"], w_min=2.0, w_max=2.0)}, "has no effect on this student.*use 3"),
        (lambda a: {"model": said(a["model"], kind="encoder")}, "goes from the picture to noise: inpainting needs"),
        (lambda a: {"model": said(a["model"], kind="naive")}, "two evaluations a step: inpainting needs one that is"),
        (lambda a: {"model": replace(a["model"], num_inference_steps=8)}, "num_inference_steps=8, but this student"),
    ],
)
def test_bad_input_is_refused(
    student: LoadedModel, pictures: Tensor, masks: Tensor, change: Change, words: str
) -> None:
    good = {
        "model": student,
        "pictures": pictures,
        "masks": masks,
        "condition": told(student),
        "w": 3.0,
        "seeds": SEEDS,
        "strength": 0.5,
    }
    bad = {**good, **change(good)}
    with pytest.raises(SamplingError, match=words):
        inpaint(**bad)
    if bad.pop("masks") is masks:
        with pytest.raises(SamplingError, match=words.replace("inpainting", "image-to-image")):
            image_to_image(**bad)


def one_pixel(masks: Tensor) -> Tensor:
    mask = torch.zeros_like(masks)
    mask[:, :, 5, 5] = 255
    return mask


def test_a_weight_outside_the_range_on_purpose(student: LoadedModel, pictures: Tensor) -> None:
    condition, same = told(student), {"strength": 0.5, "seeds": SEEDS}
    far = image_to_image(student, pictures, condition, w=9.0, extrapolate=True, **same)
    near = image_to_image(student, pictures, condition, w=6.0, **same)
    rows = image_to_image(student, pictures, condition, w=torch.tensor([9.0, 6.0]), extrapolate=True, **same)
    assert torch.equal(rows[0], far[0])
    assert torch.equal(rows[1], near[1])
    # w(t): the last of two steps begins at t = 1/4, outside.
    early = image_to_image(student, pictures, condition, w=interval_weight(6.0, 0.4, 1.0), **same)
    assert not torch.equal(early, near)
    for outside in (9.0, torch.tensor([6.0, 9.0]), interval_weight(9.0, 0.4, 1.0)):
        with pytest.raises(SamplingError, match=r"guidance_scale=10 is outside 1 … 7"):
            image_to_image(student, pictures, condition, w=outside, **same)


def test_classes_in_pixels(pictures: Tensor) -> None:
    model, small = pixel_classes(INFO), pictures[:, :, :8, :8].contiguous()
    labels = {"label": torch.tensor([0, 2])}
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[:, :, 2:5, 3:] = True
    drawn = inpaint(model, small, mask, labels, w=2.0, seeds=SEEDS)
    # No autoencoder: what stays stays to the last bit.
    assert torch.equal(drawn[~mask.expand_as(drawn)], small[~mask.expand_as(drawn)])
    assert not torch.equal(drawn, small)
    near, far = (image_to_image(model, small, labels, strength=s, w=2.0, seeds=SEEDS) for s in (0.25, 1.0))
    assert (near.float() - small).square().mean() < 0.5 * (far.float() - small).square().mean()


@pytest.fixture(scope="module")
def drawings() -> tuple[Tensor, list[str]]:
    """Real held-out drawings and their captions."""
    settings = EmojiSettings(resolution=32, num_train=1, num_evaluate=12, num_alignment=1)
    samples = list(emoji_samples(settings, "evaluate"))
    arrays = [np.array(Image.open(io.BytesIO(sample["png"])).convert("RGB")) for sample in samples]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2), [sample["txt"].decode() for sample in samples]


@pytest.fixture(scope="module")
def shipped(_own_cache: None) -> LoadedModel:
    folder = packaged_model("emoji-student-4")
    return LoadedModel(load_parts(folder), read_student_info(folder))


def test_the_shipped_student_goes_further_with_strength(
    shipped: LoadedModel, drawings: tuple[Tensor, list[str]]
) -> None:
    pictures, captions = drawings
    distances = []
    for strength in (0.25, 0.5, 0.75, 1.0):
        drawn = image_to_image(
            shipped, pictures, told(shipped, captions), strength=strength, w=2.0, seeds=range(len(pictures))
        )
        distances.append(float(((drawn.float() - pictures) / 255).square().mean()))
    # Measured: 0.027, 0.068, 0.127, 0.159; its autoencoder alone is 0.004 off.
    assert distances[0] < 0.04
    assert distances[1] > 1.6 * distances[0]
    assert distances[2] > 1.4 * distances[1]
    assert distances[3] > 1.1 * distances[2]


def test_the_shipped_student_keeps_what_is_around_a_hole(
    shipped: LoadedModel, drawings: tuple[Tensor, list[str]]
) -> None:
    pictures, captions = drawings
    masks = torch.zeros(len(pictures), 1, 32, 32, dtype=torch.bool)
    masks[:, :, 8:24, 8:24] = True
    watch, seeds = Watch(), range(len(pictures))
    drawn = inpaint(shipped, pictures, masks, told(shipped, captions), w=2.0, seeds=seeds, callback=watch)
    mean, std = shipped.parts.encode_pictures(pictures)
    x = mean + std * SeededNoise(seeds, (4, 8, 8)).draw()
    small = masks[:, :, ::4, ::4].expand_as(x)
    torch.testing.assert_close(watch.z[~small], x[~small], rtol=0, atol=1e-6)

    def error(other: Tensor, where: Tensor) -> float:
        return float(((other.float() - pictures) / 255).square()[where.expand_as(pictures)].mean())

    # Measured: 0.0122 around the hole, 0.156 in it, and 0.0042 by the autoencoder alone. Its decoder sees the whole
    # picture, so that the hole tints what is around it although the latents there are the picture's own.
    autoencoder = error(shipped.parts.decode(x), ~masks)
    assert error(drawn, ~masks) < 4 * autoencoder
    assert error(drawn, ~masks) < 0.15 * error(drawn, masks)
