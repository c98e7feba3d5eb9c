"""The command line of the benchmarks, and the table that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_bench import CPU, settings, tiny_workload

from fewstep.bench.commands import bench
from fewstep.bench.page import BEGIN, END
from fewstep.bench.train import bench_workload
from tiny import tiny_student_folder


def run(*args: object) -> Result:
    return CliRunner().invoke(bench, [str(arg) for arg in args])


def test_sample_prints_json_alone_and_the_table_takes_it(tmp_path: Path) -> None:
    folder = tiny_student_folder(tmp_path / "student")
    asked = run("sample", folder, "--device", "cpu", "--batch-size", 1, "--rounds", 1, "--teacher-steps", 2, "--json")
    assert asked.exit_code == 0, asked.output
    assert json.loads(asked.stdout)["num_inference_steps"] == 4
    sample = tmp_path / "sample.json"
    sample.write_text(asked.stdout)
    train = tmp_path / "train.json"
    result = bench_workload(tiny_workload(), settings(rounds=1), device=CPU, command="fewstep bench train tiny.yaml")
    train.write_text(json.dumps(result.to_json()))

    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\nAfter\n")
    for _ in range(2):  # writing it again changes nothing
        assert run("table", train, sample, "--into", page).exit_code == 0
        text = page.read_text()
        assert text.startswith("# Before\n")
        assert text.endswith("\nAfter\n")
        assert "old" not in text
        assert text.count("| tiny, stage guidance | 4 | float32 |") == 1
        assert text.count("student, 4 steps, 16 px | 1 | float32 |") == 1
        assert "fewstep bench train tiny.yaml" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("options", "--updates", 0), "--updates 0: Input should be greater than or equal to 1"),
        (("options", "--steps", 0), "--steps 0: Input should be greater than or equal to 1"),
        (("mixture", "--seed", -1), "--seed -1: Input should be greater than or equal to 0"),
    ],
)
def test_options_that_cannot_work_are_named(args: tuple[object, ...], message: str) -> None:
    asked = run(*args)
    assert asked.exit_code == 2
    assert message in asked.output
    assert "Traceback" not in asked.output


def test_page_and_results_must_be_what_they_should(tmp_path: Path) -> None:
    result = bench_workload(tiny_workload(), settings(rounds=1), device=CPU)
    good, bad, page = tmp_path / "good.json", tmp_path / "bad.json", tmp_path / "page.md"
    good.write_text(json.dumps(result.to_json()))
    bad.write_text("{}")
    page.write_text("# No section\n")
    asked = run("table", good, "--into", page)
    assert (asked.exit_code, page.read_text()) == (2, "# No section\n")
    assert f"error: {page} has no section between the lines {BEGIN} and {END}" in asked.output
    assert f"error: {bad} is not what" in run("table", bad, "--into", page).output
    assert "error: the page" in run("table", good, "--into", tmp_path / "none.md").output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train"], "Name a RECIPE, or take --shape sd15."),
        (["train", "--shape", "recipe"], "Name a RECIPE, or take --shape sd15."),
        (["train", "demo.yaml", "--shape", "sd15"], "--shape sd15 has its own networks: leave out demo.yaml."),
        (["train", "none.yaml"], "error: there is no recipe none.yaml"),
        (["train", "--shape", "sd15", "--updates", "3"], "error: --updates 3: Input should be a multiple of 2"),
        (
            ["train", "--shape", "sd15", "--resolution", "500"],
            "error: --resolution 500: Input should be a multiple of 64",
        ),
        (["train", "--shape", "sd15", "--device", "cpu", "--tf32"], "error: tf32 would have no effect on a CPU"),
        (
            ["train", "--shape", "sd15", "--variants", "compile,fast"],
            "error: --variants compile,fast: fast is no variant;",
        ),
        (
            ["train", "--shape", "sd15", "--variants", "compile", "--compile"],
            "error: compile is a variant of its own: name it in variants",
        ),
        (["sample"], "Name a MODEL, or take --shape sd15."),
        (["sample", "no-such-folder"], "error: 'no-such-folder'"),
        (["sample", "--shape", "sd15", "--teacher-steps", "-1"], "error: --teacher-steps -1"),
    ],
)
def test_mistakes_are_one_line_and_status_2(args: list[str], message: str) -> None:
    asked = run(*args)
    assert asked.exit_code == 2
    assert message in asked.output
