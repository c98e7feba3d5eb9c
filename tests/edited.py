"""Models and pictures that the tests of editing and translation change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.models import COSINE_CONFIG, ClassArchitecture, ClassParts, StudentInfo, make_student
from fewstep.models.editing import LoadedModel

PROMPTS = ["a red apple", "two birds on blue"]
INFO = StudentInfo("progressive", 4, 0.0, 6.0, 4.0, "tiny", "test")


def said(model: LoadedModel, **changes: Any) -> LoadedModel:
    return LoadedModel(model.parts, replace(model.info or INFO, **changes), model.num_inference_steps)


def told(model: LoadedModel, prompts: list[str] = PROMPTS) -> dict[str, Tensor]:
    return dict(model.parts.conditions([{"caption": prompt} for prompt in prompts]))


def pixel_classes(info: StudentInfo | None) -> LoadedModel:
    """A class-conditional model in pixels."""
    torch.manual_seed(0)
    shape = ClassArchitecture(
        num_classes=3,
        resolution=8,
        block_out_channels=(8, 16),
        attention_from_level=1,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    unet = shape.build_unet(in_channels=3, sample_size=8)
    if info is not None:
        unet = make_student(unet, embedding_dim=8)
    return LoadedModel(ClassParts(unet=unet, scheduler_config=COSINE_CONFIG).freeze(), info, None if info else 8)
