"""Every shipped recipe trains: convert, stage one and the first and last rung of each ladder, a few updates each.

The teacher is a tiny network of the same family and shape: the recipe's kinds of blocks, conditions, prediction type
and schedule, with few channels. Objectives and folders are those of the stages; the loop runs in this process, without
Ray.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fewstep.data.part import stack_samples
from fewstep.distill.settings import student_kind
from fewstep.models import (
    SCHEDULER_CONFIG,
    Parts,
    StudentInfo,
    TeacherArchitecture,
    TextToImageParts,
    initial_noise,
    load_model,
    read_student_info,
    sample_student,
)
from fewstep.models.editing import LoadedModel
from fewstep.models.translation import encode
from fewstep.plan import Shape
from fewstep.plan.teacher import find_shape
from fewstep.recipe import Recipe, load_recipe
from fewstep.stages.convert import _export as export_converted
from fewstep.stages.convert import _objective as convert_objective
from fewstep.stages.guidance import _objective as guidance_objective
from fewstep.stages.guidance import export_student
from fewstep.stages.progressive import _objective as progressive_objective
from fewstep.stages.teacher_source import TeacherSource
from fewstep.tracking.settings import TrackingSettings
from fewstep.train.in_process import train_in_process
from fewstep.train.job import TrainJob
from fewstep.train.settings import TrainSettings
from tiny import CAPTIONS

ROWS = 4
SIDE = 8
TOKENS = 16
FILES = sorted(Path("workflows/recipes").glob("*.yaml"))


def tiny_vae(shape: Shape) -> AutoencoderKL:
    assert shape.vae is not None
    levels = len(shape.vae["block_out_channels"])
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=shape.sample_shape[0],
        sample_size=SIDE * 2 ** (levels - 1),
    )


def tiny_unet(shape: Shape, **changes: Any) -> UNet2DConditionModel:
    """Return the shape's U-Net with its first and last resolution, few channels and little to attend to."""
    config = {key: value for key, value in shape.network.items() if not key.startswith("_")}
    for key in ("down_block_types", "up_block_types"):
        config[key] = (config[key][0], config[key][-1])
    config |= {
        "sample_size": SIDE,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "dropout": 0.0,
    }
    if config.get("num_class_embeds"):
        config["num_class_embeds"] = 11
    if shape.attended is not None:
        config["cross_attention_dim"] = 16
    if config.get("addition_embed_type_num_heads"):
        config["addition_embed_type_num_heads"] = 2
    return UNet2DConditionModel(**(config | changes))


def tiny_text(kind: type[Any] = CLIPTextModel) -> Any:
    config = {"hidden_size": 16, "intermediate_size": 32, "projection_dim": 16, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "vocab_size": 600, "max_position_embeddings": TOKENS}
    tokenizer = _tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return kind(CLIPTextConfig(**config, **ends, pad_token_id=tokenizer.pad_token_id))


def _tokenizer() -> Any:
    return TeacherArchitecture(vocabulary_size=600, max_prompt_tokens=TOKENS).train_tokenizer(CAPTIONS)


def of_text(shape: Shape, kind: Callable[..., Parts] = TextToImageParts) -> Parts:
    return kind(
        vae=tiny_vae(shape),
        text_encoder=tiny_text(),
        tokenizer=_tokenizer(),
        unet=tiny_unet(shape),
        scheduler_config=scheduler_of(shape),
    )


def scheduler_of(shape: Shape) -> dict[str, Any]:
    """Return the shape's scheduler; that of a text teacher from nothing where the recipe trains it."""
    return dict(shape.components["scheduler"]) or dict(SCHEDULER_CONFIG)


def of_inpainting(shape: Shape) -> Parts:
    from fewstep.models.inpainting import InpaintingParts

    return of_text(shape, InpaintingParts)


def of_sdxl(shape: Shape) -> Parts:
    from fewstep.models.sdxl import SDXLParts

    time_dim = 8
    unet = tiny_unet(
        shape,
        cross_attention_dim=32,
        addition_time_embed_dim=time_dim,
        projection_class_embeddings_input_dim=16 + 6 * time_dim,
    )
    return SDXLParts(
        vae=tiny_vae(shape),
        text_encoder=tiny_text(),
        text_encoder_2=tiny_text(CLIPTextModelWithProjection),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=unet,
        scheduler_config=scheduler_of(shape),
    )


def of_classes(shape: Shape) -> Parts:
    from fewstep.models.class_conditional import COSINE_CONFIG, ClassParts

    scheduler = dict(shape.components["scheduler"]) or dict(COSINE_CONFIG)  # a recipe that trains its teacher
    return ClassParts(unet=tiny_unet(shape), scheduler_config=scheduler)


def of_dit(shape: Shape) -> Parts:
    from fewstep.models.dit import ConditionedDiT, DiTParts

    config = {key: value for key, value in shape.network.items() if not key.startswith("_")}
    config |= {"sample_size": SIDE, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    transformer = ConditionedDiT(**config | {"num_embeds_ada_norm": 10})
    scheduler = dict(shape.components["scheduler"])
    return DiTParts(transformer=transformer, vae=tiny_vae(shape), scheduler_config=scheduler)


#: Family -> (the module of its file, what makes a tiny teacher of it).
FAMILIES: dict[str, Callable[[Shape], Parts]] = {
    "text": of_text,
    "inpainting": of_inpainting,
    "sdxl": of_sdxl,
    "classes": of_classes,
    "dit": of_dit,
}


def family_of(shape: Shape) -> str:
    if "patch_size" in shape.network:
        return "dit"
    marks = {"label": "classes", "pooled": "sdxl", "masked_latents": "inpainting"}
    return next((family for mark, family in marks.items() if mark in shape.conditions), "text")


class TinyBatches:
    """The same made samples for ever, as the stages' readers would give them."""

    def __init__(self, data: dict[str, Any], *, rank: int, world_size: int) -> None:
        self.data = data

    def load_state(self, state: dict[str, Any]) -> None:
        raise AssertionError("nothing is resumed here")

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield SimpleNamespace(
                data=dict(self.data), rows=list(range(ROWS)), state={"streams": {}}, counts={}, drawn={}
            )


def made_batch(parts: Parts) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    side = parts.resolution
    pixels = torch.randint(0, 256, (ROWS, parts.picture_channels, side, side), generator=generator, dtype=torch.uint8)
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[:, side // 4 : side // 2] = True
    samples = [
        {"caption": caption, "label": torch.tensor(number), "pixels": picture, "mask": mask}
        for number, (caption, picture) in enumerate(zip(CAPTIONS, pixels, strict=True))
    ]
    batch: dict[str, Any] = dict(parts.conditions(samples))
    if parts.stores_latents:
        batch["latent_mean"], batch["latent_std"] = parts.encode_pictures(pixels)
    else:
        batch |= stack_samples([{"pixels": sample["pixels"]} for sample in samples])
    return batch


def short(settings: TrainSettings) -> TrainSettings:
    """Return the recipe's settings for two updates of four rows, on one CPU, without compiling."""
    return settings.model_copy(
        update={
            "updates": 2,
            "global_batch_size": ROWS,
            "warmup_updates": min(settings.warmup_updates, 1),
            "micro_batch_size": settings.micro_batch_size and ROWS // 2,
            "compile": False,
            "checkpoint_every": 2,
            "log_every": 1,
        }
    )


def train(name: str, settings: TrainSettings, objective: Any, export: Any, batches: Any, folder: Path) -> Path:
    losses: list[float] = []
    job = TrainJob(
        name=name, fingerprint=name, objective=objective, batches=batches, export=export, settings=short(settings)
    )
    result = train_in_process(job, folder=str(folder), on_log=lambda _, figures: losses.append(figures["loss"]))
    assert len(losses) == 2
    assert all(loss >= 0 and loss < 1e4 for loss in losses)
    return Path(result.export_uri)


def source_of(folder: Path) -> TeacherSource:
    # A local folder needs no store.
    no_store: Any = None
    return TeacherSource(str(folder), no_store, TrackingSettings())


@pytest.mark.parametrize(
    "file", [file for file in FILES if load_recipe(file).guidance is not None], ids=lambda file: file.stem
)
def test_recipe_trains_with_a_tiny_teacher_of_its_shape(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.guidance is not None
    shape = find_shape(recipe)
    make = FAMILIES[family_of(shape)]
    torch.manual_seed(0)
    parts = make(shape).freeze()
    scheduler = shape.components["scheduler"]
    if scheduler:
        assert parts.prediction_type == scheduler["prediction_type"]
    assert set(parts.denoiser().condition_names) == set(shape.conditions)
    teacher = tmp_path / "teacher"
    parts.save(teacher)
    data = made_batch(parts)
    batches = partial(TinyBatches, data)

    if recipe.convert is not None:
        source = source_of(teacher)
        objective = partial(convert_objective, recipe.convert, source)
        export = partial(export_converted, recipe.convert, source)
        teacher = train("convert", recipe.convert.train, objective, export, batches, tmp_path / "convert")
    # The last rungs of every shipped recipe want a v teacher; controls show what comes of another.
    wanted = "epsilon" if recipe.name.endswith("-control") else "v_prediction"
    assert json.loads((teacher / "scheduler/scheduler_config.json").read_text())["prediction_type"] == wanted

    source = source_of(teacher)
    info = student_info(recipe, teacher, stage="guidance")
    stage_one = train(
        "guidance",
        recipe.guidance.train,
        partial(guidance_objective, recipe.guidance, source),
        partial(export_student, source, info, recipe.guidance.prediction_type),
        batches,
        tmp_path / "guidance",
    )
    if recipe.progressive is None:
        return
    for ladder in recipe.progressive.kinds:
        for w in recipe.progressive.single_w if ladder == "single_w" else (None,):
            before = teacher if ladder in ("naive", "single_w") else stage_one
            for steps in dict.fromkeys((recipe.progressive.ladder[0], recipe.progressive.ladder[-1])):
                info = student_info(
                    recipe, teacher, stage="progressive", kind=student_kind(ladder), num_inference_steps=steps
                )
                objective = partial(
                    progressive_objective,
                    recipe.progressive,
                    str(before),
                    recipe.progressive.teacher_of(steps)[1],
                    info,
                    None,
                    source,
                )
                export = partial(export_student, source, info, recipe.progressive.prediction_type.get(steps))
                settings = recipe.progressive.rung(steps)
                before = train(
                    f"{ladder} {steps}", settings, objective, export, batches, tmp_path / f"{ladder}-{steps}"
                )
            check_student(before, data, w=info.w_max if w is None else w)


def student_info(recipe: Recipe, teacher: Path, **more: Any) -> StudentInfo:
    assert recipe.guidance is not None
    w_min, w_max = recipe.guidance.weights
    more = {"num_inference_steps": None, **more}
    scale = recipe.evaluate.guidance_scale
    return StudentInfo(w_min=w_min, w_max=w_max, guidance_scale=scale, teacher=str(teacher), fingerprint="test", **more)


def check_student(folder: Path, data: dict[str, Any], *, w: float) -> None:
    """Hold that a student can be read again and draws, or encodes."""
    parts, info = load_model(folder), read_student_info(folder)
    assert info is not None
    model = parts.denoiser()
    condition = model.condition_of(data)
    noise = initial_noise(range(ROWS), parts.sample_shape)
    with torch.no_grad():
        z: Tensor
        if info.kind == "encoder":
            loaded = LoadedModel(parts, info)
            z = encode(loaded, torch.zeros(ROWS, 3, *loaded.size, dtype=torch.uint8), condition, w=w)
        else:
            z = sample_student(model, info, noise, condition, w=w)
    assert z.shape == noise.shape
    assert torch.isfinite(z).all()


def test_all_families_are_in_the_recipes() -> None:
    shapes = [find_shape(recipe) for recipe in map(load_recipe, FILES) if recipe.guidance is not None]
    assert {family_of(shape) for shape in shapes} == set(FAMILIES)
