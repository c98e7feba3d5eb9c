"""Encoding to noise and decoding again: between conditions, and there and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from edited import INFO, PROMPTS, pixel_classes, said, told
from fewstep.diffusion import ddim_encode
from fewstep.errors import SamplingError
from fewstep.models import sample_student
from fewstep.models.editing import LoadedModel
from fewstep.models.translation import encode, round_trip, translate


def test_translation_is_encoding_and_decoding(student: LoadedModel, teacher: Any, pictures: Tensor) -> None:
    by_teacher = LoadedModel(teacher, None, 6)
    source, target = told(by_teacher), told(by_teacher, PROMPTS[::-1])
    noise = encode(by_teacher, pictures, source)
    model = by_teacher.denoiser
    expected = ddim_encode(
        model.conditional(source),
        teacher.encode_pictures(pictures)[0],
        schedule=model.schedule,
        prediction_type="v_prediction",
        num_inference_steps=6,
    )
    assert torch.equal(noise, expected)
    drawn = sample_student(student.denoiser, student.info, noise, target, w=2.0)
    got = translate(by_teacher, student, pictures, source=source, target=target, w=2.0)
    assert torch.equal(got, student.parts.decode(drawn))
    guided = encode(by_teacher, pictures, source, w=1.0)
    assert float((guided - noise).abs().max()) > 1e-4


def test_a_round_trip_ends_nearer_with_more_steps(teacher: Any, pictures: Tensor) -> None:
    few, many = (
        round_trip(model, model, pictures, source=told(model), target=told(model))
        for model in (LoadedModel(teacher, None, 5), LoadedModel(teacher, None, 20))
    )
    assert (many.relative_error < 0.5 * few.relative_error).all()
    assert many.relative_error.shape == many.pixel_mse.shape == (2,)
    difference = (many.pictures.float() - pictures.float()) / 255
    torch.testing.assert_close(many.pixel_mse, difference.square().mean((1, 2, 3)))


def test_who_can_encode_and_decode(student: LoadedModel, teacher: Any, pictures: Tensor) -> None:
    source = told(student)
    encoder = said(student, kind="encoder")
    assert encode(encoder, pictures, source, w=1.0).shape == (2, 4, 4, 4)
    stage_one = LoadedModel(student.parts, replace(INFO, stage="guidance", num_inference_steps=None), 3)
    encode(stage_one, pictures, source)
    with pytest.raises(SamplingError, match=r"kind deterministic, .*: encoding pictures needs one that is encoder"):
        encode(student, pictures, source)
    for kind, what in (("encoder", "from the picture to noise"), ("stochastic", "fresh noise"), ("naive", "control")):
        with pytest.raises(SamplingError, match=f"{what}.*: decoding what was encoded needs one that is deterministic"):
            translate(encoder, said(student, kind=kind), pictures, source=source, target=source, w=2.0)
    with pytest.raises(SamplingError, match="outside 2 … 5"):
        encode(said(encoder, w_min=1.0, w_max=4.0), pictures, source)
    with pytest.raises(SamplingError, match="outside 1 … 7"):
        translate(encoder, student, pictures, source=source, target=source, w=8.0)
    with pytest.raises(SamplingError, match=r"noise is \(4, 4, 4\) and the decoder's \(3, 8, 8\)"):
        translate(encoder, pixel_classes(None), pictures, source=source, target={"label": torch.tensor([0, 1])}, w=0.0)
    other = teacher.with_network(teacher.unet, {**teacher.scheduler_config, "prediction_type": "sample"})
    with pytest.raises(SamplingError, match="encoding needs a v_prediction network"):
        encode(LoadedModel(other, None, 4), pictures, source)


def test_between_classes_in_pixels(pictures: Tensor) -> None:
    small, labels = pictures[:, :, :8, :8].contiguous(), {"label": torch.tensor([0, 2])}
    teacher = pixel_classes(None)
    other = {"label": torch.tensor([1, 1])}
    again = translate(teacher, teacher, small, source=labels, target=labels, w=0.0)
    assert (again.float() - small).abs().mean() < 20
    assert translate(teacher, pixel_classes(INFO), small, source=labels, target=other, w=1.0).shape == small.shape
