"""Tiny models that several tests only read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.models import TextToImageParts, load_parts, read_student_info
from fewstep.models.editing import LoadedModel
from tiny import tiny_student_folder, tiny_teacher, tiny_teacher_folder


@pytest.fixture(scope="session")
def teacher() -> TextToImageParts:
    return tiny_teacher()


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher_folder(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_student_folder(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture(scope="session")
def student(student_folder: Path) -> LoadedModel:
    return LoadedModel(load_parts(student_folder), read_student_info(student_folder))


@pytest.fixture(scope="session")
def pictures() -> Tensor:
    return torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
