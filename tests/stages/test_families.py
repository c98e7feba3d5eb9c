"""Stable Diffusion XL and inpainting from the first picture to the stock pipeline, without Ray: latents, stage one, a
rung of stage two."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLPipeline
from torch import nn

from counted import counted
from fewstep.data.masks import MaskSettings, mask_of
from fewstep.data.shards import write_shards
from fewstep.data.stream import StreamSettings
from fewstep.diffusion import ddim
from fewstep.distill import GuidanceObjective, ProgressiveObjective
from fewstep.models import Parts, StudentInfo, initial_noise, load_model
from fewstep.stages.batches import format_of, sample_batches
from fewstep.stages.encode_shards import Encoding, encode_shards
from fewstep.stages.guidance import export_student
from fewstep.stages.teacher_source import TeacherSource
from fewstep.storage import Storage, join
from fewstep.tracking.settings import TrackingSettings
from fewstep.train.in_process import train_in_process
from fewstep.train.job import TrainJob
from fewstep.train.settings import TrainSettings
from tiny import picture_samples, pictures_with_holes, tiny_inpainting, tiny_sdxl

TRAIN = TrainSettings(updates=3, global_batch_size=8, learning_rate=1e-3, checkpoint_every=3)
STREAM = StreamSettings(num_streams=2)
MASKS = MaskSettings()

FAMILIES: dict[str, Callable[[], Parts]] = {
    "sdxl": tiny_sdxl,
    "inpainting": tiny_inpainting,
}


def _pictures(uri: str, storage: Storage) -> list[dict[str, Any]]:
    write_shards(picture_samples(16), uri, samples_per_shard=8, storage=storage)
    return pictures_with_holes(16)


def _encode(source: str, target: str, parts: Parts, storage: Storage, **more: Any) -> None:
    masks = MASKS if parts.family == "inpainting" else None
    encoding = Encoding(batch_size=8, masks=masks, **more)
    encode_shards(source, target, parts=parts, storage=storage, encoding=encoding, max_bad_share=0.0, label="test")


def _train(name: str, folder: Path, **job: Any) -> Path:
    whole = TrainJob(name=name, fingerprint=name * 8, settings=TRAIN, seed=0, num_streams=STREAM.num_streams, **job)
    result = train_in_process(whole, folder=str(folder / name))
    assert result.updates == TRAIN.updates
    return Path(result.export_uri)


def _info(steps: int | None) -> StudentInfo:
    return StudentInfo("progressive" if steps else "guidance", steps, 0.0, 4.0, 3.0, "tiny", "test")


def _guidance(teacher: Path, device: torch.device) -> GuidanceObjective:
    return GuidanceObjective(load_model(teacher).to(device).denoiser(), w_min=0.0, w_max=4.0, embedding_dim=16)


def _progressive(before: Path, device: torch.device) -> ProgressiveObjective:
    model = load_model(before).to(device).denoiser()
    return ProgressiveObjective(model, num_inference_steps=2, w_min=0.0, w_max=4.0)


def _stock(family: str, folder: Path, samples: list[dict[str, Any]], noise: torch.Tensor) -> tuple[Any, list[int]]:
    kinds: dict[str, Any] = {"sdxl": StableDiffusionXLPipeline, "inpainting": StableDiffusionInpaintPipeline}
    pipeline = kinds[family].from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    inputs: dict[str, Any] = {}
    if family == "inpainting":
        condition = load_model(folder).conditions(samples)
        inputs = {
            "image": torch.stack([sample["pixels"] for sample in samples]) / 255,
            "mask_image": torch.stack([sample["mask"] for sample in samples]).float(),
            "masked_image_latents": condition["masked_latents"],
        }
    with counted(pipeline.unet) as calls:
        captions = [sample["caption"] for sample in samples]
        out = pipeline(
            captions, num_inference_steps=2, guidance_scale=3.0, latents=noise, output_type="latent", **inputs
        )
    return out.images, calls


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pictures_to_the_stock_pipeline(family: str, storage: Storage, bucket_uri: str, tmp_path: Path) -> None:
    pictures, teacher = join(bucket_uri, "pictures"), tmp_path / "teacher"
    samples = _pictures(pictures, storage)
    FAMILIES[family]().save(teacher)
    parts = load_model(teacher)
    assert parts.family == family
    latents = join(bucket_uri, "latents")
    _encode(pictures, latents, parts, storage)
    batches = partial(
        sample_batches,
        latents,
        decode=format_of(parts).decoder(),
        storage=storage,
        stream=STREAM,
        global_batch_size=TRAIN.global_batch_size,
        seed=0,
    )
    batch = next(iter(batches(rank=0, world_size=1))).data
    assert set(parts.denoiser().condition_names) <= set(batch)
    source = TeacherSource(str(teacher), storage, TrackingSettings())
    stage_one = _train(
        "guidance",
        tmp_path,
        objective=partial(_guidance, teacher),
        batches=batches,
        export=partial(export_student, source, _info(None), None),
    )
    student = _train(
        "progressive",
        tmp_path,
        objective=partial(_progressive, stage_one),
        batches=batches,
        export=partial(export_student, source, _info(2), None),
    )

    held_out = [{**sample, "mask": mask_of(sample["key"], 16, settings=MASKS, seed=0)} for sample in samples[:3]]
    noise = initial_noise(range(3), parts.sample_shape)
    stock, calls = _stock(family, student, held_out, noise)
    assert calls == [3, 3]
    own = load_model(student)
    model = own.denoiser()
    drawn = ddim(
        model.conditional(own.conditions(held_out), 2.0),
        noise,
        schedule=model.schedule,
        prediction_type=model.prediction_type,
        num_inference_steps=2,
    )
    torch.testing.assert_close(drawn, stock, rtol=0, atol=1e-5)
    trained, untrained = own.network.state_dict(), load_model(stage_one).network.state_dict()
    assert any(not torch.equal(trained[key], untrained[key]) for key in trained)
    assert isinstance(own.network, nn.Module)


def test_masks_belong_to_their_sample_and_the_seed() -> None:
    first = mask_of("0001", 32, settings=MASKS, seed=0)
    assert torch.equal(mask_of("0001", 32, settings=MASKS, seed=0), first)
    assert not torch.equal(mask_of("0002", 32, settings=MASKS, seed=0), first)
    assert not torch.equal(mask_of("0001", 32, settings=MASKS, seed=1), first)


def test_what_is_stored_of_an_inpainting_sample_is_what_the_model_makes_of_it(
    storage: Storage, bucket_uri: str
) -> None:
    source, target = join(bucket_uri, "pictures"), join(bucket_uri, "latents")
    samples = _pictures(source, storage)
    parts = tiny_inpainting()
    _encode(source, target, parts, storage, seed=7)
    decode = format_of(parts).decoder()
    batches = sample_batches(
        target, decode=decode, storage=storage, stream=STREAM, global_batch_size=16, seed=0, rank=0, world_size=1
    )
    batch = next(iter(batches)).data
    by_caption = {sample["caption"]: [] for sample in samples}
    for sample in samples:
        mask = mask_of(sample["key"], 16, settings=MASKS, seed=7)
        by_caption[sample["caption"]].append(parts.conditions([{**sample, "mask": mask}]))
    for row, caption in enumerate(batch["caption"]):
        stored = {name: batch[name][row].float() for name in ("mask", "masked_latents")}
        assert any(
            torch.equal(stored["mask"], made["mask"][0])
            and torch.allclose(stored["masked_latents"], made["masked_latents"][0], atol=2e-3)
            for made in by_caption[caption]
        )
