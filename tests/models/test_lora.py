"""Students of adapters: what is trained, what is saved, and the same pictures in a stock pipeline over the base."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from fewstep.diffusion import ddim
from fewstep.errors import ModelError, RecipeError
from fewstep.models import (
    ClassArchitecture,
    StudentInfo,
    TextToImageParts,
    initial_noise,
    load_parts,
    make_student,
    read_student_info,
)
from fewstep.models.lora import (
    ADAPTER_FILE,
    LoraSettings,
    adapters_in,
    has_adapters,
    lora_student,
    merged,
    save_adapters,
)
from fewstep.recipe import parse_recipe
from fewstep.stages.guidance import check_lora, export_student
from fewstep.stages.progressive import _lora_student
from fewstep.tracking.adapters import add_flavor
from tiny import tiny_recipe, tiny_teacher

pytest.importorskip("peft")

PROMPTS = ["a red apple", "two birds on blue"]
SETTINGS = LoraSettings(rank=3, alpha=6.0)
INFO = StudentInfo(
    stage="progressive",
    num_inference_steps=4,
    w_min=3.0,
    w_max=3.0,
    guidance_scale=4.0,
    teacher="tiny",
    fingerprint="test",
    lora_base="tiny",
)


def _trained(base: Any, settings: LoraSettings = SETTINGS) -> Any:
    """A student whose adapters have an effect."""
    torch.manual_seed(1)
    student = lora_student(base, settings)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return student.eval()


class _Source:
    """A teacher as the stages have it."""

    uri = "tiny"

    def __init__(self, parts: TextToImageParts) -> None:
        self._parts = parts

    def load(self) -> TextToImageParts:
        return self._parts


@pytest.fixture(scope="module")
def exported(teacher: TextToImageParts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A student of one weight on the tiny teacher, and its folder."""
    student, folder = _trained(teacher.unet), tmp_path_factory.mktemp("lora") / "student"
    export_student(_Source(teacher), INFO, None, student, str(folder))  # type: ignore[arg-type]
    return student, folder


def _inputs(parts: TextToImageParts) -> tuple[Tensor, Tensor, Tensor]:
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return z, torch.tensor([999, 400]), parts.encode_prompts(PROMPTS)


@torch.no_grad()
def _latents(pipeline: StableDiffusionPipeline, noise: Tensor, *, scale: float, steps: int = 4) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    latents: Tensor = pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=scale, latents=noise, output_type="latent"
    ).images
    return latents


def _own_latents(folder: Path, noise: Tensor, *, w: float) -> Tensor:
    parts = load_parts(folder)
    return ddim(
        parts.denoiser().conditional(parts.conditions([{"caption": prompt} for prompt in PROMPTS]), w),
        noise,
        schedule=parts.schedule,
        prediction_type=parts.prediction_type,
        num_inference_steps=4,
    )


def test_a_new_student_is_its_base_and_only_adapters_are_trained(teacher: TextToImageParts) -> None:
    student = lora_student(teacher.unet, SETTINGS)
    inputs = _inputs(teacher)
    with torch.no_grad():
        assert torch.equal(student.eval()(*inputs).sample, teacher.unet(*inputs).sample)
    trained = [name for name, weight in student.named_parameters() if weight.requires_grad]
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    adapted = {name.split(".lora_")[0] for name in trained}
    # Every weight matrix inside the blocks: what lies outside is the time embedding, conv_in and conv_out.
    assert adapted == {
        name
        for name, module in teacher.unet.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and "block" in name
    }
    assert {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "down_blocks.0.resnets.0.conv1"} <= adapted
    assert not has_adapters(teacher.unet)
    rank_of = {tuple(w.shape) for n, w in student.named_parameters() if n.endswith("attn1.to_q.lora_A.default.weight")}
    assert all(shape[0] == 3 for shape in rank_of)


def test_merging_changes_nothing_but_the_names(teacher: TextToImageParts, exported: tuple[Any, Path]) -> None:
    student, _ = exported
    whole, inputs = merged(student), _inputs(teacher)
    assert set(whole.state_dict()) == set(teacher.unet.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(whole(*inputs).sample, student(*inputs).sample, rtol=0, atol=1e-5)
        assert float((whole(*inputs).sample - teacher.unet(*inputs).sample).abs().max()) > 1e-2
    assert has_adapters(student)
    assert not has_adapters(whole)


def test_the_folder_gives_its_pictures_in_a_stock_pipeline_over_the_teacher(
    teacher: TextToImageParts, exported: tuple[Any, Path]
) -> None:
    _, folder = exported
    noise = initial_noise(range(2), (4, 4, 4))
    pipeline = tiny_teacher().pipeline()
    pipeline.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    before = _latents(pipeline, noise, scale=1.0)
    pipeline.load_lora_weights(folder)
    sizes = []
    hook = pipeline.unet.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    by_adapters = _latents(pipeline, noise, scale=1.0)
    hook.remove()
    assert sizes == [2] * 4, "one evaluation a picture and step"
    torch.testing.assert_close(by_adapters, _own_latents(folder, noise, w=3.0), rtol=0, atol=1e-5)
    assert float((by_adapters - before).abs().max()) > 1e-2, "the adapters have no effect, so this test shows nothing"
    whole = StableDiffusionPipeline.from_pretrained(folder)
    torch.testing.assert_close(_latents(whole, noise, scale=1.0), by_adapters, rtol=0, atol=1e-5)


def test_the_folder_says_what_it_is(exported: tuple[Any, Path]) -> None:
    _, folder = exported
    assert read_student_info(folder) == INFO
    assert adapters_in(folder) == folder / ADAPTER_FILE
    assert adapters_in(folder / "unet") is None
    with safe_open(folder / ADAPTER_FILE, "pt") as file:
        assert all(name.startswith("unet.") for name in file.keys())  # noqa: SIM118  # not a dictionary
    assert (folder / ADAPTER_FILE).stat().st_size < (folder / "unet/diffusion_pytorch_model.safetensors").stat().st_size


def test_on_a_w_conditioned_base_the_weight_stays_an_input(teacher: TextToImageParts, tmp_path: Path) -> None:
    base = make_student(teacher.unet, embedding_dim=16).eval()
    torch.manual_seed(2)
    torch.nn.init.normal_(base.time_embedding.cond_proj.weight, std=0.5)
    folder = tmp_path / "student"
    student = _trained(base)
    assert torch.equal(student.time_embedding.cond_proj.weight, base.time_embedding.cond_proj.weight)
    assert not student.time_embedding.cond_proj.weight.requires_grad
    export_student(_Source(teacher), INFO, None, student, str(folder))  # type: ignore[arg-type]
    pipeline = teacher.with_network(base, load_parts(folder).scheduler_config).pipeline()
    pipeline.load_lora_weights(folder)
    noise = initial_noise(range(2), (4, 4, 4))
    for w in (1.0, 3.0):
        torch.testing.assert_close(
            _latents(pipeline, noise, scale=1 + w), _own_latents(folder, noise, w=w), rtol=0, atol=1e-5
        )


def test_adapters_go_on_from_those_of_the_student_before(
    teacher: TextToImageParts, exported: tuple[Any, Path], tmp_path: Path
) -> None:
    student, folder = exported
    going_on = lora_student(teacher.unet, SETTINGS, start=folder).eval()
    weights = dict(student.named_parameters())
    for name, weight in going_on.named_parameters():
        assert torch.equal(weight, weights[name]), name
        assert weight.requires_grad == weights[name].requires_grad
    with pytest.raises(ModelError, match=r"have r=3, and lora asks for 8"):
        lora_student(teacher.unet, LoraSettings(rank=8, alpha=16.0), start=folder)
    with pytest.raises(ModelError, match=rf"holds no {ADAPTER_FILE}"):
        lora_student(teacher.unet, SETTINGS, start=tmp_path)


def test_a_rung_begins_as_the_student_before_it_on_the_same_base(
    teacher: TextToImageParts, teacher_folder: Path, exported: tuple[Any, Path]
) -> None:
    student, folder = exported
    make = partial(
        _lora_student, SETTINGS, info=INFO, storage=None, source=_Source(teacher), device=torch.device("cpu")
    )
    inputs = _inputs(teacher)
    with torch.no_grad():
        assert torch.equal(make(before=str(folder)).eval()(*inputs).sample, student(*inputs).sample)
        assert torch.equal(make(before="tiny").eval()(*inputs).sample, teacher.unet(*inputs).sample)
    with pytest.raises(ModelError, match="has no adapters on tiny to go on from: leave lora out"):
        make(before=str(teacher_folder))


def test_both_stages_must_name_the_same_adapters(teacher_folder: Path) -> None:
    content = tiny_recipe(teacher_folder, name="lora")
    content = {key: value for key, value in content.items() if key not in ("register", "evaluate")}
    content["stages"] = content["stages"][:4]
    content["evaluate"] = {"guidance_scale": 3.0}
    del content["guidance"]["embedding_dim"]
    content["guidance"] |= {"single_w": 2.0, "lora": {"rank": 4}}
    check_lora(parse_recipe(content))
    content["progressive"] |= {"lora": {"rank": 4}}
    check_lora(parse_recipe(content))
    content["progressive"] |= {"lora": {"rank": 5}}
    with pytest.raises(RecipeError, match=r"guidance.lora is rank=4, alpha=None and progressive.lora rank=5"):
        check_lora(parse_recipe(content))


def test_an_average_of_the_adapters_is_one_of_a_student(teacher: TextToImageParts) -> None:
    """What the loop averages and checkpoints are the trained weights: a student takes them back by their names."""
    student = _trained(teacher.unet)
    state = {name: weight.clone() for name, weight in student.state_dict().items()}
    other = lora_student(teacher.unet, SETTINGS)
    other.load_state_dict(state)
    inputs = _inputs(teacher)
    with torch.no_grad():
        assert torch.equal(other.eval()(*inputs).sample, student(*inputs).sample)


def test_class_conditional_networks_get_adapters_too(tmp_path: Path) -> None:
    sizes = ClassArchitecture(
        num_classes=3, resolution=8, block_out_channels=(16, 16), attention_from_level=1, norm_num_groups=4
    )
    base = sizes.build_unet(in_channels=3, sample_size=8).eval()
    student = _trained(base)
    save_adapters(student, tmp_path)
    going_on = lora_student(base, SETTINGS, start=tmp_path).eval()
    z, time, label = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 500.0]), torch.tensor([0, 3])
    with torch.no_grad():
        outputs = [net(z, time, None, class_labels=label).sample for net in (student, going_on, merged(student), base)]
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[2], outputs[0], rtol=0, atol=1e-5)
    assert float((outputs[3] - outputs[0]).abs().max()) > 1e-3


def test_what_cannot_be_adapted_is_refused(teacher: TextToImageParts, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="target_modules=\\['to_nothing'\\] cannot be adapted"):
        lora_student(teacher.unet, LoraSettings(rank=2, target_modules=("to_nothing",)))
    with pytest.raises(ValidationError, match="the projection of w, which the base does not have"):
        LoraSettings(target_modules=("to_q", "cond_proj"))
    monkeypatch.setattr("fewstep.models.lora.find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match="needs the package peft, which is not installed: pip install 'fewstep\\[lora\\]'"
    ):
        lora_student(teacher.unet, SETTINGS)


def test_mlflow_reads_a_student_as_adapters(
    teacher_folder: Path, exported: tuple[Any, Path], tmp_path: Path, caplog: Any
) -> None:
    """In one folder with the student's own files, as a version in the registry is; without a network."""
    import mlflow

    _, student = exported
    folder = shutil.copytree(student, tmp_path / "version")
    file = folder / ADAPTER_FILE
    add_flavor(folder, adapters=file, base="asset:tiny", num_inference_steps=4, guidance_scale=1.0)
    assert not caplog.records
    assert read_student_info(folder) == INFO
    noise = initial_noise(range(2), (4, 4, 4))
    expected = _own_latents(folder, noise, w=3.0)
    model = mlflow.diffusers.load_model(str(folder))
    assert (model.base_model, model.adapter_type) == ("asset:tiny", "lora")
    pipeline = model.load_pipeline(base_model=str(teacher_folder), device="cpu")
    pipeline.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    torch.testing.assert_close(_latents(pipeline, noise, scale=1.0), expected, rtol=0, atol=1e-5)
    params = mlflow.models.get_model_info(str(folder)).signature.params.params
    assert {each.name: each.default for each in params} == {"num_inference_steps": 4, "guidance_scale": 1.0}
