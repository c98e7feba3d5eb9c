"""Shared networks, and one thread: in these many small products two threads that wait for each other are far slower."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from fewstep.evaluate.features import Lite0Features, limited_threads
from fewstep.models import TextToImageParts, make_student

sys.path.insert(0, str(Path(__file__).parents[2]))

from tiny import tiny_teacher


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    with limited_threads(1):
        yield


@pytest.fixture(scope="session")
def lite0() -> Lite0Features:
    return Lite0Features(num_threads=1)


@pytest.fixture(scope="session")
def teacher() -> TextToImageParts:
    return tiny_teacher()


@pytest.fixture(scope="session")
def student(teacher: TextToImageParts) -> UNet2DConditionModel:
    """A student whose output depends on w."""
    unet = make_student(teacher.unet, embedding_dim=8)
    torch.manual_seed(1)
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.5)
    return unet.eval().requires_grad_(False)
