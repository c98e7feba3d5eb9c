"""Stable Diffusion XL: its folder in and out, its conditions, and its student in the stock pipeline."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from counted import counted
from fewstep.diffusion import ddim
from fewstep.errors import ModelError, SamplingError
from fewstep.models import (
    SDXLParts,
    StudentInfo,
    TeacherArchitecture,
    TextToImageParts,
    initial_noise,
    load_model,
    load_parts,
    load_text_to_image,
    make_student,
    read_student_info,
    save_student,
)
from fewstep.serve.catalog import ImageRequest
from fewstep.serve.engine import Engine, Student, load_student, make_card
from fewstep.serve.sample import sample_images
from fewstep.tracking.settings import TrackingSettings
from tiny import tiny_sdxl, w_student

PROMPTS = ["a red apple", "two birds on blue", "an emoji"]
W = 3.0


@pytest.fixture(scope="module")
def sdxl() -> SDXLParts:
    return tiny_sdxl()


@pytest.fixture(scope="module")
def folder(sdxl: SDXLParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl") / "teacher"
    sdxl.save(folder)
    return folder


def _student_folder(folder: Path, sdxl: SDXLParts, steps: int) -> Path:
    info = StudentInfo("progressive", steps, 0.0, 6.0, 4.0, "tiny", "test")
    save_student(folder, sdxl, w_student(sdxl.unet), info)
    return folder


def _pipeline(folder: Path) -> StableDiffusionXLPipeline:
    with warnings.catch_warnings():
        # diffusers warns when it has to mend a configuration: what we ship must need no mending.
        warnings.simplefilter("error", FutureWarning)
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_student_gives_the_same_latents_in_the_stock_pipeline(sdxl: SDXLParts, tmp_path: Path, steps: int) -> None:
    folder = _student_folder(tmp_path / "student", sdxl, steps)
    noise = initial_noise(range(3), sdxl.latent_shape)
    pipeline = _pipeline(folder)
    with counted(pipeline.unet) as calls:
        stock = pipeline(
            PROMPTS, num_inference_steps=steps, guidance_scale=1 + W, latents=noise, output_type="latent"
        ).images
    assert calls == [len(PROMPTS)] * steps
    parts = load_model(folder)
    model = parts.denoiser()
    condition = parts.conditions([{"caption": prompt} for prompt in PROMPTS])
    settings = {"schedule": model.schedule, "prediction_type": model.prediction_type, "num_inference_steps": steps}
    with counted(parts.network) as calls:
        own = ddim(model.conditional(condition, W), noise, **settings)
    assert calls == [len(PROMPTS)] * steps
    torch.testing.assert_close(own, stock, rtol=0, atol=1e-5)
    other = ddim(model.conditional(condition, 0.5), noise, **settings)
    assert float((other - stock).abs().max()) > 1e-3, "w has no effect, so this test shows nothing"
    with pytest.raises(SamplingError, match="no unconditional branch"):
        model.guided(condition, W)


@pytest.mark.parametrize("force_zeros", [True, False])
def test_the_guided_teacher_is_the_stock_pipelines_guidance(tmp_path: Path, force_zeros: bool) -> None:
    tiny_sdxl(force_zeros=force_zeros).save(tmp_path)
    noise = initial_noise(range(3), (4, 4, 4))
    stock = _pipeline(tmp_path)(
        PROMPTS, num_inference_steps=4, guidance_scale=1 + W, latents=noise, output_type="latent"
    ).images
    parts = load_model(tmp_path)
    assert isinstance(parts, SDXLParts)
    assert parts.force_zeros_for_empty_prompt == force_zeros
    model = parts.denoiser()
    condition = parts.conditions([{"caption": prompt} for prompt in PROMPTS])
    own = ddim(
        model.guided(condition, W),
        noise,
        schedule=model.schedule,
        prediction_type=model.prediction_type,
        num_inference_steps=4,
    )
    torch.testing.assert_close(own, stock, rtol=0, atol=1e-5)


def test_the_null_replaces_text_and_pooled_and_leaves_the_sizes(sdxl: SDXLParts) -> None:
    condition = sdxl.conditions([{"caption": prompt} for prompt in PROMPTS])
    assert {name: tuple(value.shape) for name, value in condition.items()} == {
        "text": (3, 16, 40),
        "pooled": (3, 24),
        "time_ids": (3, 6),
    }
    assert condition["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 3
    assert condition["time_ids"].dtype == torch.int64, "no precision must round sizes"
    zeros = sdxl.denoiser().unconditional(condition)
    assert not zeros["text"].any()
    assert not zeros["pooled"].any()
    assert torch.equal(zeros["time_ids"], condition["time_ids"])
    empty = tiny_sdxl(force_zeros=False).denoiser().unconditional(condition)
    text, pooled = sdxl.encode_prompts([""])
    assert torch.equal(empty["text"], text.expand(3, -1, -1))
    assert torch.equal(empty["pooled"], pooled.expand(3, -1))


def test_every_condition_reaches_the_network(sdxl: SDXLParts) -> None:
    model, z, time = sdxl.denoiser(), torch.randn(2, 4, 4, 4), torch.tensor([700, 300])
    condition = dict(sdxl.conditions([{"caption": "a red apple"}, {"caption": "two birds"}]))
    base = model.conditional(condition)(z, time)
    for name, value in condition.items():
        changed = model.conditional({**condition, name: value + 40 if name == "time_ids" else value * 1.5})(z, time)
        assert float((changed - base).abs().max()) > 1e-4, name


def test_save_and_load_keep_every_weight(sdxl: SDXLParts, folder: Path) -> None:
    loaded = load_model(folder)
    assert isinstance(loaded, SDXLParts)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        before, after = getattr(sdxl, name).state_dict(), getattr(loaded, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert not any(parameter.requires_grad for parameter in getattr(loaded, name).parameters())
    ids, again = sdxl.token_ids(["a red apple", ""]), loaded.token_ids(["a red apple", ""])
    assert all(torch.equal(ids[name], again[name]) for name in ids)
    assert (loaded.resolution, loaded.latent_shape, loaded.family) == (16, (4, 4, 4), "sdxl")
    loaded.save(folder.parent / "copy")
    for file in (folder.parent / "copy").rglob("*.json"):
        assert str(folder) not in file.read_text(encoding="utf-8"), file


def test_a_new_student_is_the_conditional_teacher_bit_for_bit(sdxl: SDXLParts) -> None:
    model = sdxl.denoiser()
    student = model.with_network(make_student(sdxl.unet, embedding_dim=16))
    condition = sdxl.conditions([{"caption": prompt} for prompt in PROMPTS])
    z, time = torch.randn(3, 4, 4, 4), torch.tensor([999, 400, 0])
    with torch.no_grad():
        assert torch.equal(student.conditional(condition, 3.7)(z, time), model.conditional(condition)(z, time))


def test_in_half_precision_the_vae_that_overflows_stays_whole(folder: Path) -> None:
    parts = load_model(folder, dtype=torch.float16)
    assert isinstance(parts, SDXLParts)
    assert (parts.unet.dtype, parts.vae.dtype) == (torch.float16, torch.float32)
    assert parts.decode(torch.randn(1, 4, 4, 4)).shape == (1, 3, 16, 16)
    assert parts.to("cpu", torch.bfloat16).vae.dtype == torch.bfloat16


def test_a_student_draws_from_prompts_alone_and_can_be_served(sdxl: SDXLParts, tmp_path: Path) -> None:
    folder = _student_folder(tmp_path / "student", sdxl, 2)
    parts, info = load_text_to_image(folder), read_student_info(folder)
    assert isinstance(parts, SDXLParts)
    images = sample_images(
        parts, prompts=PROMPTS, seeds=[1, 2, 3], num_inference_steps=2, guidance_scale=1 + W, info=info
    )
    stock = _pipeline(folder)(
        PROMPTS,
        num_inference_steps=2,
        guidance_scale=1 + W,
        latents=initial_noise([1, 2, 3], parts.latent_shape),
        output_type="np",
    ).images
    for image, expected in zip(images, stock, strict=True):
        assert np.abs(np.array(image) / 255 - expected).max() <= 1 / 255 + 1e-6
    student = load_student(str(folder), storage=None, tracking=TrackingSettings())
    engine = Engine([student, Student(make_card("again", parts, info), parts, info)])
    assert engine.students[1].parts.text_encoder_2 is student.parts.text_encoder_2, "equal networks are shared"
    request = ImageRequest(prompt=PROMPTS[0], seed=1, model="again", guidance_scale=1 + W)
    drawn = torch.from_numpy(engine.generate([request])[0].pixels).int()
    assert int((drawn - torch.from_numpy(np.array(images[0])).int()).abs().max()) <= 1


def test_it_is_no_stable_diffusion(folder: Path, teacher_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"of the family sdxl, and a text-to-image model of Stable Diffusion's kind"):
        load_parts(folder)
    assert isinstance(load_text_to_image(teacher_folder), TextToImageParts)


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def test_a_missing_part_is_named(broken: Path) -> None:
    shutil.rmtree(broken / "tokenizer_2")
    shutil.rmtree(broken / "text_encoder_2")
    with pytest.raises(ModelError, match=r"lacks text_encoder_2/ \(the second text encoder\), tokenizer_2/"):
        load_model(broken)


def test_a_folder_that_calls_itself_stable_diffusion_is_refused(broken: Path) -> None:
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ModelError, match="names another pipeline: save it with StableDiffusionXLPipeline"):
        load_model(broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 9}, "takes 9 channels in but the VAE's latents have 4"),
        ({"text_width": 32}, "takes 56 numbers a token but the encoders give 40"),
        ({"second_text_width": 32, "text_width": 8}, "takes 224 added numbers but pooled text and 6 sizes give 216"),
    ],
)
def test_a_unet_that_does_not_fit_is_refused(broken: Path, changes: dict[str, int], message: str) -> None:
    channels = changes.pop("latent_channels", 4)
    sizes = {"text_width": 16, "second_text_width": 24, "text_heads": 2, "num_attention_heads": 2, **changes}
    architecture = TeacherArchitecture(family="sdxl", block_out_channels=(16, 32), norm_num_groups=4, **sizes)
    shutil.rmtree(broken / "unet")
    architecture.build_unet(latent_channels=channels, latent_size=4).save_pretrained(broken / "unet")
    with pytest.raises(ModelError, match=message):
        load_model(broken)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "sdxl", "text_layers": 1}, "text_layers=1, but sdxl takes the last but one layer"),
        ({"family": "sdxl", "pooled_text": False}, "pooled_text=false is not possible with family: sdxl"),
        ({"second_text_width": 32}, "second_text_width=32 is for family: sdxl"),
        ({"family": "sdxl", "second_text_width": 33}, "second_text_width=33 cannot be shared equally by text_heads=4"),
    ],
)
def test_architectures_that_cannot_work(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherArchitecture(**settings)
