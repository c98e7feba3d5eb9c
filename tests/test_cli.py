"""The command line: what a newcomer reads, and that mistakes are one clear line and status 2."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from fewstep.cli import main
from fewstep.models import load_parts, read_student_info
from tiny import tiny_student_folder, tiny_teacher_folder


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_student_folder(tmp_path_factory.mktemp("student"), num_inference_steps=2)


@pytest.mark.parametrize("command", ["run", "stage", "demo", "sample", "export", "serve", "evaluate", "bench", "keys"])
def test_every_command_explains_itself(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) >= 4
    assert command in call("--help").output


def test_every_option_of_every_command_has_a_help_text() -> None:
    bench = main.commands["bench"]
    assert isinstance(bench, click.Group)
    assert set(bench.commands) == {"train", "sample", "table"}
    for command in [*main.commands.values(), *bench.commands.values()]:
        assert command.help, command.name
        for parameter in command.params:
            assert not isinstance(parameter, click.Option) or parameter.help, (command.name, parameter.name)


def test_sample_writes_one_picture_for_each_prompt(student: Path, tmp_path: Path) -> None:
    result = call("sample", student, "a red apple", "two birds", "--out", tmp_path, "--seed", "7")
    assert result.exit_code == 0, result.output
    files = sorted(tmp_path.glob("*.png"))
    assert [str(file) for file in files] == result.output.splitlines()
    assert [Image.open(file).size for file in files] == [(16, 16), (16, 16)]
    assert Image.open(files[1]).info["seed"] == "8"
    assert Image.open(files[0]).info["num_inference_steps"] == "2"


def test_sample_takes_a_teacher_too(tmp_path: Path) -> None:
    teacher = tiny_teacher_folder(tmp_path / "teacher")
    result = call("sample", teacher, "a red apple", "--out", tmp_path / "out", "--steps", "3")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "3"], "num_inference_steps=3, but this student was made for 2"),
        (["--guidance-scale", "9"], "guidance_scale=9 is outside 1 … 7"),
    ],
)
def test_sample_refuses_what_the_student_was_not_made_for(student: Path, arguments: list[str], words: str) -> None:
    result = call("sample", student, "a red apple", *arguments)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert words in result.output


def test_sample_refuses_an_empty_prompt(student: Path) -> None:
    result = call("sample", student, "  ")
    assert result.exit_code == 2
    assert "prompt is empty" in result.output


def test_a_full_disk_is_one_line(student: Path, tmp_path: Path) -> None:
    (tmp_path / "000-seed0.png").symlink_to("/dev/full")
    result = call("sample", student, "a red apple", "--out", tmp_path)
    assert result.exit_code == 2
    assert result.output.startswith("error: sample: the disk is full (OSError: [Errno 28] No space left on device)")
    assert f"{tmp_path} has " in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["sample", "a red apple", "--out"], ["export"]])
def test_a_file_that_is_named_for_a_folder_is_one_line(student: Path, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "file").write_text("")
    result = call(arguments[0], student, *arguments[1:], tmp_path / "file")
    assert result.exit_code == 2
    assert f"{tmp_path}/file cannot be made: a file is where a folder is needed" in result.output
    assert len(result.output.splitlines()) == 1


def test_a_fault_of_ours_keeps_its_stack(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.models.export.export_model", lambda *arguments, **options: 1 / 0)
    assert isinstance(call("export", student, tmp_path / "out").exception, ZeroDivisionError)


def test_ctrl_c_is_the_way_to_stop_serving(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def wait(self) -> None:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("fewstep.serving.served", lambda *models, **options: contextlib.nullcontext(Interrupted()))
    result = call("serve", student)
    assert result.exit_code == 0
    assert result.output.splitlines() == ["Stop with Ctrl-C.", "Stopped serving."]


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = call("sample", tmp_path / "nowhere", "a red apple")
    assert result.exit_code == 2
    assert "there is no such folder" in result.output


def test_a_recipe_that_is_not_there() -> None:
    result = call("run", "nowhere.yaml")
    assert result.exit_code == 2
    assert "there is no recipe nowhere.yaml" in result.output


def test_a_stage_that_is_not_there(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nstages: [prepare]\nprepare: {}\nteacher: t\n")
    result = CliRunner(env={"FEWSTEP_HOME": str(tmp_path)}).invoke(main, ["stage", "bake", str(recipe)])
    assert result.exit_code == 2
    assert "no stage bake" in result.output


def test_export_gives_a_plain_diffusers_folder(student: Path, tmp_path: Path) -> None:
    result = call("export", student, tmp_path / "out")
    assert result.exit_code == 0, result.output
    pipe = StableDiffusionPipeline.from_pretrained(str(tmp_path / "out"))
    assert pipe.unet.config.time_cond_proj_dim == 16
    again = call("export", student, tmp_path / "out")
    assert again.exit_code == 2
    assert "is not empty" in again.output


def test_export_of_a_unet_alone_in_half_precision(student: Path, tmp_path: Path) -> None:
    result = call("export", student, tmp_path / "out", "--half", "--on", "some-teacher")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compose.json", "fewstep.json", "scheduler", "unet"}
    weights = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    info = read_student_info(tmp_path / "out")
    assert info is not None
    assert info.num_inference_steps == 2
    full = load_parts(student).unet.state_dict()
    assert all(torch.allclose(full[name], tensor.float(), atol=1e-3) for name, tensor in weights.items())
