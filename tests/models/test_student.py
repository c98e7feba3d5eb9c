"""The w-conditioned student: its input, its beginning and what its folder says of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from fewstep.errors import ModelError, SamplingError
from fewstep.models import (
    StudentInfo,
    TextToImageParts,
    copy_student,
    copy_unet,
    guidance_embedding,
    load_parts,
    make_student,
    read_student_info,
    student_scheduler_config,
)
from tiny import tiny_student_folder

INFO = StudentInfo(
    stage="progressive",
    num_inference_steps=4,
    w_min=1.0,
    w_max=6.0,
    guidance_scale=4.0,
    teacher="tiny",
    fingerprint="test",
)


@pytest.mark.parametrize("width", [16, 255, 256, 512])
def test_guidance_embedding_is_the_pipelines_own(width: int) -> None:
    w = torch.tensor([0.0, 0.5, 3.0, 6.5, 14.0])
    unbound: Any = StableDiffusionPipeline.get_guidance_scale_embedding
    expected = unbound(None, w, embedding_dim=width, dtype=torch.float32)
    assert guidance_embedding(w, width).shape == (5, width)
    # 1000 w reaches 14 000, of which float32 keeps three decimals.
    torch.testing.assert_close(guidance_embedding(w, width), expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(guidance_embedding(w[:2], width), expected[:2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("w", [0.0, 3.7, 14.0])
def test_a_new_student_is_the_conditional_teacher_bit_for_bit(teacher: TextToImageParts, w: float) -> None:
    student = make_student(teacher.unet, embedding_dim=16)
    z, index = torch.randn(3, 4, 4, 4), torch.tensor([999, 400, 0])
    text = teacher.encode_prompts(["a red apple", "two birds", ""])
    parts = teacher.with_network(student, teacher.scheduler_config)
    with torch.no_grad():
        assert torch.equal(
            parts.denoiser().conditional({"text": text}, w)(z, index), teacher.unet(z, index, text).sample
        )


def test_a_new_student_is_trainable_and_leaves_the_teacher_alone(teacher: TextToImageParts) -> None:
    student = make_student(teacher.unet, embedding_dim=16)
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert student.config["time_cond_proj_dim"] == 16
    assert teacher.unet.config["time_cond_proj_dim"] is None
    before = teacher.unet.conv_out.weight.clone()
    with torch.no_grad():
        student.conv_out.weight.add_(1)
    assert torch.equal(teacher.unet.conv_out.weight, before)


def test_a_student_cannot_be_the_teacher_of_stage_one(teacher: TextToImageParts) -> None:
    student = make_student(teacher.unet, embedding_dim=16)
    with pytest.raises(ModelError, match=r"already conditioned on w .*time_cond_proj_dim=16"):
        make_student(student)


def test_copy_unet_copies_weights_into_new_memory(teacher: TextToImageParts) -> None:
    student = make_student(teacher.unet, embedding_dim=16)
    copy = copy_unet(student)
    for name, parameter in copy.named_parameters():
        original = student.get_parameter(name)
        assert torch.equal(parameter, original)
        assert parameter.data_ptr() != original.data_ptr()
        assert parameter.requires_grad


def test_w_tells_rows_apart(student_folder: Path) -> None:
    parts = load_parts(student_folder)
    z, index = torch.randn(1, 4, 4, 4).expand(2, -1, -1, -1), torch.tensor([749, 749])
    text = parts.encode_prompts(["a red apple", "a red apple"])
    with torch.no_grad():
        low, high = parts.denoiser().conditional({"text": text}, torch.tensor([0.0, 5.0]))(z, index)
        both_low = parts.denoiser().conditional({"text": text}, 0.0)(z, index)
    assert float((low - high).abs().max()) > 1e-3
    torch.testing.assert_close(both_low[0], low, rtol=0, atol=1e-5)


def test_the_scheduler_that_ships_keeps_the_noise_and_changes_the_grid() -> None:
    leading = {
        "_class_name": "PNDMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "timestep_spacing": "leading",
    }
    config = student_scheduler_config(leading)
    assert config["_class_name"] == "DDIMScheduler"
    assert (config["timestep_spacing"], config["set_alpha_to_one"], config["clip_sample"]) == ("trailing", True, False)
    # diffusers' default, which the file of an eps teacher may leave out.
    assert config["prediction_type"] == "epsilon"
    assert config["beta_start"] == 0.00085
    assert "skip_prk_steps" not in config


def test_the_folder_says_what_the_student_is_for(student_folder: Path, teacher_folder: Path) -> None:
    info = read_student_info(student_folder)
    assert info is not None
    assert (info.stage, info.num_inference_steps, info.w_min, info.w_max) == ("progressive", 4, 0.0, 6.0)
    assert read_student_info(teacher_folder) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"stage": "progressive"}'])
def test_a_damaged_note_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "fewstep.json").write_text(content)
    with pytest.raises(ModelError, match=r"fewstep\.json is damaged .*export the student again"):
        read_student_info(tmp_path)


def test_a_note_of_a_later_format_is_refused(tmp_path: Path, student_folder: Path) -> None:
    shutil.copy(student_folder / "fewstep.json", tmp_path)
    content = json.loads((tmp_path / "fewstep.json").read_text())
    (tmp_path / "fewstep.json").write_text(json.dumps({**content, "format_version": 2}))
    with pytest.raises(ModelError, match="format_version=2, this fewstep reads 1: update fewstep"):
        read_student_info(tmp_path)


@pytest.mark.parametrize("scale", [2.0, 4.5, 7.0])
def test_what_it_was_made_for_is_taken(scale: float) -> None:
    INFO.check(num_inference_steps=4, guidance_scale=scale)


def test_another_step_count_is_refused() -> None:
    with pytest.raises(SamplingError, match=r"num_inference_steps=50, but this student was made for 4.*Use 4"):
        INFO.check(num_inference_steps=50, guidance_scale=4.0)


@pytest.mark.parametrize("scale", [1.0, 1.99, 7.01, 7.5])
def test_a_guidance_scale_outside_the_range_is_refused(scale: float) -> None:
    with pytest.raises(SamplingError, match=rf"guidance_scale={scale:g} is outside 2 … 7.*w in 1 … 6"):
        INFO.check(num_inference_steps=4, guidance_scale=scale)


def test_a_student_of_stage_one_takes_any_step_count() -> None:
    stage_one = StudentInfo("guidance", None, 0.0, 4.0, 3.0, "tiny", "test")
    for steps in (1, 3, 50):
        stage_one.check(num_inference_steps=steps, guidance_scale=5.0)


def test_a_copied_student_says_other_things_and_has_the_same_weights(tmp_path: Path) -> None:
    folder = tiny_student_folder(tmp_path / "student", num_inference_steps=4)
    info = read_student_info(folder)
    assert info is not None
    said = (folder / "fewstep.json").read_text()
    copy_student(folder, tmp_path / "copy", replace(info, guidance_scale=3.0))
    copied = read_student_info(tmp_path / "copy")
    assert copied == replace(info, guidance_scale=3.0)
    assert (folder / "fewstep.json").read_text() == said
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "copy" / weights).read_bytes() == (folder / weights).read_bytes()
