"""Tiny models that several tests only read."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.models import TextToImageParts
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
