"""`bench sample`: student, bare calls and guided teacher in turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.bench.sample import bench_sample
from fewstep.bench.settings import SampleBenchSettings
from fewstep.errors import SamplingError
from tiny import tiny_student_folder, tiny_teacher_folder


def settings(**values: object) -> SampleBenchSettings:
    return SampleBenchSettings.model_validate({"device": "cpu", "batch_size": 2, "rounds": 3, **values})


def test_student_against_the_guided_teacher(tmp_path: Path) -> None:
    folder = tiny_student_folder(tmp_path / "student", num_inference_steps=2)
    result = bench_sample(settings(teacher_steps=20), model=folder, name="tiny")
    assert result.num_inference_steps == 2
    assert result.resolution == 16
    assert result.precision == "float32"
    assert result.seconds_per_image == pytest.approx(1 / result.images_per_second)
    assert result.tflops == pytest.approx(result.images_per_second * result.gflop_per_image / 1e3)
    assert result.bare_share_cpu_time is not None
    assert 0.05 < result.bare_share_cpu_time < 1.5
    assert result.speedup is not None
    assert result.speedup > 3  # 2 evaluations against 40, and a decoder on both sides
    assert "network evaluations 2 against 40" in result.table()


def test_teacher_folder_and_no_comparison(tmp_path: Path) -> None:
    result = bench_sample(settings(teacher_steps=0, rounds=1), model=tiny_teacher_folder(tmp_path / "teacher"))
    assert result.num_inference_steps == 4
    assert result.speedup is None
    assert result.teacher_images_per_second is None
    assert "against the teacher" not in result.table()


def test_more_steps_cost_more_flops(tmp_path: Path) -> None:
    folder = tiny_teacher_folder(tmp_path / "teacher")
    costs = [
        bench_sample(settings(teacher_steps=0, rounds=1, num_inference_steps=n), model=folder).gflop_per_image
        for n in (1, 2, 3)
    ]
    assert costs[2] - costs[1] == pytest.approx(costs[1] - costs[0])
    assert costs[1] > costs[0]


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    folder = tiny_student_folder(tmp_path / "student", num_inference_steps=4)
    with pytest.raises(SamplingError, match="made for 4"):
        bench_sample(settings(num_inference_steps=3), model=folder)
    with pytest.raises(SamplingError, match="resolution=256 has no effect on a model"):
        bench_sample(settings(resolution=256), model=folder)
