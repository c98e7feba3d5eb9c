"""The numbers that training gives: a change that should not alter them must not; one that should writes new ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_training import Kind, real_job

from fewstep.train.in_process import train_in_process
from tiny import tiny_student_folder, tiny_teacher_folder

#: Loss of updates 1, 10 and 20.
LOSSES: dict[Kind, tuple[float, float, float]] = {
    "denoising": (1.0417904, 1.0500516, 1.0915830),
    "guidance": (0.0046897903, 0.011269091, 0.0083126295),
    "progressive": (0.0071820212, 0.015543297, 0.011662622),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_twenty_updates_give_the_losses_they_always_gave(kind: Kind, tmp_path: Path) -> None:
    folder = (tiny_student_folder if kind == "progressive" else tiny_teacher_folder)(tmp_path / "model")
    losses: dict[int, float] = {}
    train_in_process(real_job(kind, folder), on_log=lambda done, figures: losses.update({done: figures["loss"]}))
    # Processors differ in the order of their sums, which Adam magnifies over the updates.
    assert (losses[1], losses[10], losses[20]) == pytest.approx(LOSSES[kind], rel=1e-3)
