"""The experiment with the options of the ladder, on tiny models: all rows, and a table of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.bench.options import AVERAGED, UNTRAINED, options_table, run_options
from fewstep.bench.options_rung import BASELINE, OTHER_SEED, OptionsSettings
from fewstep.errors import ModelError, RecipeError
from tiny import tiny_student_folder, tiny_teacher_folder


def _settings(teacher: Path, student: Path, *variants: str) -> OptionsSettings:
    return OptionsSettings(
        teacher=str(teacher),
        student=str(student),
        variants=(BASELINE, *variants),
        updates=2,
        batch_size=4,
        num_train=8,
        num_prompts=20,
        num_real=24,
        reference_steps=2,
        num_bootstrap=100,
        categories=("food-and-drink",),
    )


def test_rows_and_table(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    teacher = tiny_teacher_folder(tmp_path / "teacher")
    student = tiny_student_folder(tmp_path / "student")
    said: list[str] = []
    settings = _settings(teacher, student, OTHER_SEED, "lora rank 16")
    result = run_options(settings, say=said.append)
    rows = result["rows"]
    assert list(rows) == [UNTRAINED, BASELINE, AVERAGED, OTHER_SEED, "lora rank 16"]
    assert len(said) == 1 + len(rows)
    for name, row in rows.items():
        assert row["paired_mse_ci"][0] <= row["paired_mse"] <= row["paired_mse_ci"][1]
        assert row["paired_mse_difference"] == pytest.approx(row["paired_mse"] - rows[BASELINE]["paired_mse"])
        assert ("nothing" in row["verdict"] or "something" in row["verdict"]) == (name in (AVERAGED, "lora rank 16"))
    assert rows[BASELINE]["paired_mse_difference_ci"] == (0.0, 0.0)
    assert rows["lora rank 16"]["trained_weights"] < rows[BASELINE]["trained_weights"]
    assert rows[OTHER_SEED]["paired_mse"] != rows[BASELINE]["paired_mse"]
    table = options_table(result)
    assert sum(line.startswith("| ") for line in table.splitlines()) == 1 + len(rows)
    assert "| lora rank 16 | Luo et al. 2023 (LCM-LoRA) |" in table


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    with pytest.raises(RecipeError, match=r"they must be among .*baseline"):
        run_options(_settings(folder, folder, "nothing"))
    teacher = tiny_teacher_folder(tmp_path / "teacher")
    with pytest.raises(ModelError, match=r"is no student of fewstep: it has no fewstep\.json"):
        run_options(_settings(teacher, teacher))
