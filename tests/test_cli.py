"""The command line: what a newcomer reads, and that mistakes are one clear line and status 2."""

from __future__ import annotations

import contextlib
import signal
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from fewstep.cli import main
from fewstep.models import copy_student, load_parts, read_student_info
from fewstep.models.editing import LoadedModel, image_to_image
from tiny import tiny_student_folder, tiny_teacher_folder


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_student_folder(tmp_path_factory.mktemp("student"), num_inference_steps=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher_folder(tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize(
    "command",
    [
        *("run", "stage", "demo", "sample", "edit", "export", "serve", "evaluate", "inspect", "bench", "plan", "keys"),
        *("prepare", "promote", "versions"),
    ],
)
def test_every_command_explains_itself(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) >= 4
    assert command in call("--help").output


def test_every_option_of_every_command_has_a_help_text() -> None:
    bench = main.commands["bench"]
    assert isinstance(bench, click.Group)
    assert set(bench.commands) == {"train", "sample", "data", "options", "translation", "mixture", "table"}
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


def test_sample_takes_a_teacher_too(teacher: Path, tmp_path: Path) -> None:
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


def test_sample_beyond_the_trained_range_on_purpose_and_guided_in_an_interval(student: Path, tmp_path: Path) -> None:
    options = ["--guidance-scale", "9", "--extrapolate", "--guidance-interval", "0.6", "1"]
    result = call("sample", student, "a red apple", "--out", tmp_path, *options)
    assert result.exit_code == 0, result.output
    notes = Image.open(tmp_path / "000-seed0.png").info
    assert (notes["guidance_scale"], notes["guidance_interval"]) == ("9", "0.6 … 1")


def test_a_negative_prompt_is_for_teachers(student: Path, teacher: Path, tmp_path: Path) -> None:
    result = call("sample", student, "a red apple", "--negative-prompt", "blurry")
    assert result.exit_code == 2
    assert "error: a negative prompt has no effect on this model: its guidance is distilled" in result.output
    options = ["--out", tmp_path, "--steps", "2", "--negative-prompt", "blurry"]
    result = call("sample", teacher, "a red apple", *options)
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "000-seed0.png").info["negative_prompt"] == "blurry"


@pytest.fixture
def apple(tmp_path: Path) -> Path:
    image = Image.new("RGB", (16, 16), "white")
    image.paste("red", (4, 4, 12, 12))
    image.save(tmp_path / "apple.png")
    return tmp_path / "apple.png"


@pytest.fixture
def hole(tmp_path: Path) -> Path:
    mask = Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    mask.save(tmp_path / "hole.png")
    return tmp_path / "hole.png"


def pixels(file: str | Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(file).convert("RGB")))


def test_edit_writes_one_picture_for_each_prompt(student: Path, apple: Path, tmp_path: Path) -> None:
    prompts = ["--prompt", "a green apple", "--prompt", "two birds"]
    result = call("edit", student, apple, *prompts, "--out", tmp_path / "out", "--seed", "5")
    assert result.exit_code == 0, result.output
    files = sorted((tmp_path / "out").glob("*.png"))
    assert [str(file) for file in files] == result.output.splitlines()
    notes = Image.open(files[1]).info
    assert (notes["prompt"], notes["seed"], notes["strength"], notes["image"]) == ("two birds", "6", "0.5", "apple.png")
    parts, info = load_parts(student), read_student_info(student)
    expected = image_to_image(
        LoadedModel(parts, info),
        pixels(apple).permute(2, 0, 1)[None],
        parts.conditions([{"caption": "a green apple"}]),
        strength=0.5,
        w=3.0,
        seeds=[5],
    )
    difference = pixels(files[0]).int() - expected[0].permute(1, 2, 0).int()
    assert int(difference.abs().max()) <= 1  # of another batch size


def test_edit_with_a_mask_keeps_the_rest_if_asked(student: Path, apple: Path, hole: Path, tmp_path: Path) -> None:
    for number, options in enumerate((["--keep-pixels"], ["--keep-pixels", "--strength", "0.5"])):
        out = tmp_path / str(number)
        result = call("edit", student, apple, "--prompt", "birds", "--mask", hole, "--out", out, *options)
        assert result.exit_code == 0, result.output
        drawn = pixels(out / "000-seed0.png")
        assert torch.equal(drawn[:, :8], pixels(apple)[:, :8])
        assert not torch.equal(drawn[:, 8:], pixels(apple)[:, 8:])
        notes = Image.open(out / "000-seed0.png").info
        assert (notes["mask"], notes["strength"]) == ("hole.png", ("1", "0.5")[number])


def test_edit_translates_with_a_teacher_or_an_encoder(
    student: Path, teacher: Path, apple: Path, tmp_path: Path
) -> None:
    info = read_student_info(student)
    assert info is not None
    copy_student(student, tmp_path / "encoder", replace(info, kind="encoder", w_min=0.5))
    for number, (model, options) in enumerate(
        (
            (teacher, ["--steps", "3"]),
            (student, ["--encoder", teacher, "--steps", "3"]),
            (student, ["--encoder", tmp_path / "encoder"]),
        )
    ):
        out = tmp_path / str(number)
        result = call("edit", model, apple, "--prompt", "birds", "--from-prompt", "an apple", "--out", out, *options)
        assert result.exit_code == 0, result.output
        assert Image.open(out / "000-seed0.png").info["from_prompt"] == "an apple"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--strength", "0.3"], "strength=0.3 is no time that this student can begin at"),
        (["--strength", "0.3"], "Strengths that work: 0.5, 1"),
        (["--prompt", " "], "The prompt is empty"),
        (["--steps", "3"], "num_inference_steps=3, but this student was made for 2"),
        (["--guidance-scale", "9"], "guidance_scale=9 is outside 1 … 7"),
        (["--guidance-interval", "0.6", "0.9"], "no step begins within the guidance interval 0.6 … 0.9"),
        (["--keep-pixels"], "--keep-pixels has no effect without --mask"),
        (["--mask", "{small}"], "the mask small.png is 8 × 8 pixels, and this model draws 16 × 16: resize"),
        (["--mask", "{apple}"], "the mask apple.png is in colour: white is the hole"),
        (["--mask", "{grey}"], "a mask has the value 100: 255 is the hole and 0 what stays"),
        (["--mask", "{text}"], "text.png cannot be read"),
        (["--from-prompt", "an apple"], "goes from noise to the picture alone, and --from-prompt needs the way back"),
        (["--from-prompt", "an apple", "--strength", "0.5"], "--strength has no effect with --from-prompt"),
        (["--from-prompt", "an apple", "--mask", "{grey}"], "--mask has no effect with --from-prompt"),
        (["--from-prompt", "an apple", "--seed", "1"], "--seed has no effect with --from-prompt"),
        (["--encoder", "{student}"], "--encoder has no effect without --from-prompt"),
        (["--from-prompt", "an apple", "--encoder", "{student}"], "encoding pictures needs one that is encoder"),
    ],
)
def test_edit_refuses_what_cannot_work(
    student: Path, apple: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    Image.new("L", (16, 16), 100).save(tmp_path / "grey.png")
    (tmp_path / "text.png").write_text("no picture")
    files = {name: tmp_path / f"{name}.png" for name in ("small", "grey", "text")}
    filled = [option.format(apple=apple, student=student, **files) for option in options]
    result = call("edit", student, apple, "--prompt", "a green apple", "--out", tmp_path / "out", *filled)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert words in result.output
    assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_edit_refuses_pictures_that_it_would_have_to_change_first(student: Path, tmp_path: Path) -> None:
    for size, mode, words in (
        ((20, 10), "RGB", "x.png is 20 × 10 pixels"),
        ((16, 16), "RGBA", "transparent in places"),
    ):
        Image.new(mode, size).save(tmp_path / "x.png")
        result = call("edit", student, tmp_path / "x.png", "--prompt", "a green apple")
        assert result.exit_code == 2
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_the_way_to_stop_serving(student: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    class Interrupted:
        def wait(self) -> None:
            signal.raise_signal(number)

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
