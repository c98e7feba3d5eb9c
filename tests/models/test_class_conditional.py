"""Class-conditional U-Nets, in pixels and in latents: guidance, the student, the folder and its pipeline."""

from __future__ import annotations

import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from counted import counted
from fewstep.errors import ModelError, SamplingError
from fewstep.models import (
    SCHEDULER_CONFIG,
    ClassArchitecture,
    ClassConditionalPipeline,
    ClassParts,
    SeededNoise,
    initial_noise,
    load_model,
    make_student,
    read_student_info,
    sample_student,
)
from tiny_classes import NAMES, class_student, some_inputs, student_folder, tiny_class_model

SEEDS = (5, 6, 7)


@pytest.fixture(scope="module", params=["class_pixel", "class_latent"])
def parts(request: pytest.FixtureRequest) -> ClassParts:
    made = tiny_class_model(latent=request.param == "class_latent")
    assert made.family == request.param
    return made


def _pipeline(folder: Path) -> ClassConditionalPipeline:
    pipeline = ClassConditionalPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def test_what_it_says_of_itself(parts: ClassParts) -> None:
    latent = parts.family == "class_latent"
    assert parts.num_classes == 3
    assert parts.stores_latents == latent
    assert parts.sample_shape == ((4, 4, 4) if latent else (1, 8, 8))
    assert (parts.resolution, parts.picture_channels) == (8, 1)
    assert torch.equal(parts.conditions([{"label": 2}, {"label": torch.tensor(0)}])["label"], torch.tensor([2, 0]))


def test_pictures_go_in_and_out(parts: ClassParts) -> None:
    pixels = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = parts.encode_pictures(pixels)
    assert mean.shape == std.shape == (3, *parts.sample_shape)
    if parts.family == "class_pixel":
        assert float(std.abs().max()) == 0
        assert torch.equal(parts.decode(mean), pixels)
    else:
        assert parts.vae is not None
        plain = parts.vae.encode(pixels.float() / 127.5 - 1).latent_dist
        torch.testing.assert_close(mean, plain.mean * 0.7)
        assert parts.decode(mean).shape == pixels.shape
        assert parts.decode(mean).dtype == torch.uint8


@torch.no_grad()
def test_guidance_is_against_the_label_after_the_last(parts: ClassParts) -> None:
    z, time, condition = some_inputs(parts)
    model, w = parts.denoiser(), torch.tensor([0.0, 1.5, 3.0])
    told = parts.schedule.network_time(time)
    with_class = parts.unet(z, told, None, class_labels=condition["label"]).sample
    without = parts.unet(z, told, None, class_labels=torch.full((3,), 3)).sample
    assert float((with_class - without).abs().max()) > 1e-2
    weights = w.view(-1, 1, 1, 1)
    torch.testing.assert_close(
        model.guided(condition, w)(z, time), (1 + weights) * with_class - weights * without, rtol=0, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("embedding_dim", [16, None])
def test_a_new_student_is_the_conditional_teacher_bit_for_bit(parts: ClassParts, embedding_dim: int | None) -> None:
    z, time, condition = some_inputs(parts)
    student = make_student(parts.unet, embedding_dim=embedding_dim)
    model = parts.denoiser().with_network(student.eval())
    assert torch.equal(model.conditional(condition, 2.5)(z, time), parts.denoiser().conditional(condition)(z, time))


def test_students_have_no_dropout() -> None:
    teacher = tiny_class_model(dropout=0.3).unet
    assert teacher.config["dropout"] == 0.3
    assert make_student(teacher).config["dropout"] == 0.0


@torch.no_grad()
def test_a_student_is_told_w_and_has_one_branch(parts: ClassParts) -> None:
    z, time, condition = some_inputs(parts)
    student = parts.with_network(class_student(parts.unet), parts.scheduler_config).denoiser()
    low, high = (student.conditional(condition, w)(z, time) for w in (0.0, 3.0))
    assert float((low - high).abs().max()) > 1e-3
    with pytest.raises(SamplingError, match="no unconditional branch"):
        student.guided(condition, 1.0)


def test_a_folder_is_the_model(parts: ClassParts, tmp_path: Path) -> None:
    parts.save(tmp_path / "teacher")
    read = load_model(tmp_path / "teacher")
    assert isinstance(read, ClassParts)
    assert (read.family, read.class_names, read.scheduler_config["clip_sample"]) == (
        parts.family,
        NAMES,
        parts.family == "class_pixel",
    )
    assert read.schedule.same_as(parts.schedule)
    z, time, condition = some_inputs(parts)
    assert torch.equal(
        read.denoiser().guided(condition, 2.0)(z, time), parts.denoiser().guided(condition, 2.0)(z, time)
    )
    assert torch.equal(read.decode(z), parts.decode(z))


def test_the_teachers_folder_samples_as_ours(parts: ClassParts, tmp_path: Path) -> None:
    parts.save(tmp_path)
    pipeline, condition = _pipeline(tmp_path), {"label": torch.tensor([0, 1, 2])}
    with counted(pipeline.unet) as calls:
        theirs = pipeline(
            [0, 1, 2], num_inference_steps=3, guidance_scale=2.5, generator=_generators(), output_type="latent"
        ).images
    assert calls == [6, 6, 6]
    ours = sample_student(
        parts.denoiser(),
        None,
        initial_noise(SEEDS, parts.sample_shape),
        condition,
        w=1.5,
        num_inference_steps=3,
    )
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    images = pipeline(
        [0, 1, 2], num_inference_steps=3, guidance_scale=2.5, generator=_generators(), output_type="np"
    ).images
    shown = (torch.from_numpy(images).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)
    assert int((shown.int() - parts.decode(ours).int()).abs().max()) <= 1


def test_x_is_clipped_where_the_scheduler_says_so(parts: ClassParts, tmp_path: Path) -> None:
    assert parts.denoiser().clip_sample == (not parts.stores_latents)
    if parts.stores_latents:
        return
    # A discrete teacher in pixels clips, as diffusers' schedulers do by default; its students do so nowhere.
    config = {**SCHEDULER_CONFIG, "clip_sample": True}
    discrete = parts.with_network(parts.network, config)
    assert discrete.denoiser().clip_sample
    folder = student_folder(tmp_path / "student", discrete, kind="deterministic")
    own, info = load_model(folder), read_student_info(folder)
    assert info is not None
    noise, condition = 3 * initial_noise(SEEDS, own.sample_shape), {"label": torch.tensor([0, 1, 2])}
    ours = sample_student(own.denoiser(), info, noise, condition, w=1.5)
    theirs = _pipeline(folder)(
        torch.tensor([0, 1, 2]), num_inference_steps=4, guidance_scale=2.5, latents=noise, output_type="latent"
    ).images
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert float(ours.abs().max()) > 1


def test_a_start_that_is_none_of_the_students_is_refused(parts: ClassParts, tmp_path: Path) -> None:
    folder = student_folder(tmp_path / "student", parts, kind="deterministic")
    own, info = load_model(folder), read_student_info(folder)
    noise, condition = initial_noise(SEEDS, own.sample_shape), {"label": torch.tensor([0, 1, 2])}
    sample_student(own.denoiser(), info, noise, condition, w=1.5, start=Fraction(3, 4))
    for start in (Fraction(1, 3), Fraction(0), Fraction(5, 4)):
        with pytest.raises(SamplingError, match=r"none of the times .* must be a multiple of 1/4 above 0, up to 1"):
            sample_student(own.denoiser(), info, noise, condition, w=1.5, start=start)


@pytest.mark.parametrize("kind", ["deterministic", "stochastic"])
def test_a_students_folder_samples_as_ours_with_one_call_a_step(parts: ClassParts, tmp_path: Path, kind: Any) -> None:
    folder = student_folder(tmp_path / "student", parts, kind=kind)
    pipeline, own, info = _pipeline(folder), load_model(folder), read_student_info(folder)
    assert info is not None
    with counted(pipeline.unet) as calls:
        theirs = pipeline(
            torch.tensor([0, 1, 2]),
            num_inference_steps=4,
            guidance_scale=2.5,
            generator=_generators(),
            output_type="latent",
        ).images
    assert calls == [3] * 4
    noise = SeededNoise(SEEDS, own.sample_shape)
    ours = sample_student(
        own.denoiser(),
        info,
        noise.draw(),
        {"label": torch.tensor([0, 1, 2])},
        w=1.5,
        noise=lambda step: noise.draw(),
    )
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    again = pipeline([1], num_inference_steps=4, guidance_scale=2.5, latents=initial_noise([6], own.sample_shape))
    assert again.images[0].size == (8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_labels": [0, 3, -1]}, r"class_labels has \[-1, 3\], and the classes of this model are 0 … 2"),
        ({"class_labels": []}, "give a list of whole numbers"),
        ({"class_labels": [0.5]}, "give a list of whole numbers"),
        ({"class_labels": ["cat"]}, "give a list of whole numbers"),
        ({"class_labels": 1}, "give a list of whole numbers"),
        ({"latents": torch.zeros(3, 1, 8, 8)}, r"latents are \(3, 1, 8, 8\), and 2 labels .* need \(2, 1, 8, 8\)"),
        ({"latents": torch.zeros(2, 1, 4, 4)}, r"latents are \(2, 1, 4, 4\)"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 is below 1"),
        ({"guidance_scale": 0.5}, "guidance_scale=0.5 is below 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"output_type": "jpeg"}, "output_type='jpeg' is none of pil, np and latent"),
    ],
)
def test_the_pipeline_refuses_what_it_cannot_do(changes: dict[str, Any], message: str) -> None:
    pipeline = tiny_class_model().pipeline()
    with pytest.raises(SamplingError, match=message):
        pipeline(**{"class_labels": [0, 1], "num_inference_steps": 1, **changes})


def test_networks_that_know_no_classes_or_too_many_are_refused() -> None:
    parts = tiny_class_model()
    sizes: dict[str, Any] = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4}
    plain: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    with pytest.raises(ModelError, match=r"no num_class_embeds.*one more for no class"):
        replace(parts, unet=UNet2DConditionModel(**sizes, **plain, cross_attention_dim=8))
    with pytest.raises(ModelError, match="the U-Net has a UNetMidBlock2DCrossAttn, which attends to text"):
        replace(parts, unet=UNet2DConditionModel(**sizes, **plain, cross_attention_dim=8, num_class_embeds=4))
    channels = {"mid_block_type": "UNetMidBlock2D", "num_class_embeds": 4, "in_channels": 1, "out_channels": 2}
    with pytest.raises(ModelError, match="takes 1 channels and outputs 2"):
        replace(parts, unet=UNet2DConditionModel(**sizes, **plain, **channels))
    with pytest.raises(ModelError, match="2 classes have names and the network knows 3"):
        replace(parts, class_names=NAMES[:2])
    with pytest.raises(ModelError, match="takes 1 channels but the VAE has latents of 4"):
        replace(parts, vae=tiny_class_model(latent=True).vae)


def test_a_folder_without_its_vae_is_refused(tmp_path: Path) -> None:
    tiny_class_model(latent=True).save(tmp_path)
    shutil.rmtree(tmp_path / "vae")
    with pytest.raises(ModelError, match=r"lacks vae/ \(the autoencoder of the latents\)"):
        load_model(tmp_path)


def test_sizes_build_what_they_say() -> None:
    unet = ClassArchitecture(num_classes=7, block_out_channels=(16, 32), attention_from_level=1).build_unet(
        in_channels=3, sample_size=16
    )
    assert unet.config["num_class_embeds"] == 8
    assert unet.config["down_block_types"] == ("DownBlock2D", "AttnDownBlock2D")
    assert unet.config["time_cond_proj_dim"] is None
