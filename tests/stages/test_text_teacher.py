"""The teacher stage for Stable Diffusion XL and for inpainting, its trainings in this process instead of on Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from fewstep.data.shards import write_shards
from fewstep.errors import ModelError, RecipeError
from fewstep.models import COSINE_CONFIG, ClassArchitecture, ClassParts, InpaintingParts, SDXLParts, load_model
from fewstep.recipe import parse_recipe
from fewstep.stage_settings import TeacherStage
from fewstep.stages import training
from fewstep.stages.context import StageContext
from fewstep.stages.teacher import teacher
from fewstep.storage import Storage, join
from fewstep.tracking.fetch import fetch_model
from fewstep.tracking.settings import TrackingSettings
from fewstep.tracking.tracker import Tracker
from fewstep.train.in_process import train_in_process
from fewstep.train.job import TrainJob, TrainResult
from tiny import picture_samples, tiny_sdxl, tiny_teacher

TRAIN = {"updates": 2, "global_batch_size": 8, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def tracker(storage: Storage, new_database: Callable[[], str]) -> Tracker:
    return Tracker.open(TrackingSettings(uri=new_database(), experiment="t"), storage)


@pytest.fixture(scope="module")
def shards(storage: Storage) -> str:
    uri = join(storage.root, "pictures-for-teachers")
    write_shards(picture_samples(16), uri, samples_per_shard=8, storage=storage)
    return uri


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Train here: what Ray does beside it is the business of tests/integration."""

    def run_training(job: TrainJob, *, storage: Storage, uri: str, **_: Any) -> TrainResult:
        result = train_in_process(job, folder=str(tmp_path / job.name))
        storage.upload_folder(Path(result.export_uri), join(uri, "export"))
        return TrainResult(**{**result.to_json(), "export_uri": join(uri, "export")})

    monkeypatch.setattr(training, "run_training", run_training)


@pytest.fixture
def run(storage: Storage, tracker: Tracker, shards: str, tmp_path: Path) -> Callable[..., tuple[Any, Any, Path]]:
    """Return a function that runs the stage and gives the teacher as it began, as it became, and its folder."""

    def run_stage(**train_teacher: Any) -> tuple[Any, Any, Path]:
        recipe = parse_recipe(
            {
                "name": "tiny-teacher",
                "stages": ["teacher"],
                "data": {"train": shards},
                "stream": {"num_streams": 2},
                "cluster": {"use_gpu": False},
                "train_teacher": {"train": TRAIN, **train_teacher},
            }
        )
        with tracker.run("teacher", key=str(tmp_path)) as of_stage:
            context = StageContext(recipe, storage, tracker, of_stage, of_stage.id, tmp_path)
            facts = teacher(context)
        assert facts["network"]["updates"] == TRAIN["updates"]
        uri = context.uri("teacher")
        folder = fetch_model(join(uri, "export"), storage=storage)
        return load_model(fetch_model(join(uri, "begin"), storage=storage)), load_model(folder), folder

    return run_stage


def _changed(before: Any, after: Any, name: str) -> bool:
    old, new = getattr(before, name).state_dict(), getattr(after, name).state_dict()
    return any(not torch.equal(old[key], new[key]) for key in old)


def test_a_teacher_of_stable_diffusion_xls_shape_from_nothing(run: Callable[..., Any]) -> None:
    sizes = {"block_out_channels": [16, 32], "num_attention_heads": 2, "norm_num_groups": 4}
    texts = {"text_width": 16, "second_text_width": 24, "text_layers": 2, "text_heads": 2}
    network = {"family": "sdxl", **sizes, **texts, "vocabulary_size": 600, "max_prompt_tokens": 16}
    vae = {"resolution": 16, "block_out_channels": [8, 16, 16], "norm_num_groups": 4}
    begin, parts, folder = run(network=network, autoencoder=vae, autoencoder_train=TRAIN)
    assert isinstance(parts, SDXLParts)
    assert not parts.force_zeros_for_empty_prompt, "its captions were dropped by leaving them empty"
    assert [_changed(begin, parts, name) for name in ("unet", "text_encoder", "text_encoder_2", "vae")] == [
        True,
        True,
        True,
        False,
    ]
    pipe = StableDiffusionXLPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red apple", num_inference_steps=2, guidance_scale=3.0).images[0].size == (16, 16)


def test_fresh_networks_around_the_vae_of_a_model(run: Callable[..., Any], tmp_path: Path) -> None:
    taken = tiny_teacher(seed=3)
    taken.save(tmp_path / "text")
    network = {"block_out_channels": [16, 32], "num_attention_heads": 2, "norm_num_groups": 4}
    network |= {"text_width": 16, "text_layers": 1, "text_heads": 2, "vocabulary_size": 600, "max_prompt_tokens": 16}
    begin, parts, _ = run(vae=str(tmp_path / "text"), network=network)
    for name, weight in taken.vae.state_dict().items():
        assert torch.equal(parts.vae.state_dict()[name], weight)
    assert parts.vae.config["scaling_factor"] == taken.vae.config["scaling_factor"]
    assert (parts.resolution, parts.latent_shape) == (taken.resolution, taken.latent_shape)
    assert not torch.equal(begin.unet.conv_in.weight, taken.unet.conv_in.weight), "the networks are fresh"
    assert _changed(begin, parts, "unet")


def test_a_model_in_pixels_has_no_vae(run: Callable[..., Any], tmp_path: Path) -> None:
    unet = ClassArchitecture(
        num_classes=3, resolution=8, block_out_channels=(8, 16), attention_head_dim=8, norm_num_groups=4
    ).build_unet(in_channels=3, sample_size=8)
    ClassParts(unet=unet, scheduler_config=dict(COSINE_CONFIG)).save(tmp_path / "pixels")
    with pytest.raises(RecipeError, match=r"vae=.*works in pixels and has no autoencoder: name a model in latents"):
        run(vae=str(tmp_path / "pixels"))


def test_an_inpainting_teacher_is_made_of_a_text_model(run: Callable[..., Any], tmp_path: Path) -> None:
    tiny_teacher().save(tmp_path / "text")
    begin, parts, _ = run(init=str(tmp_path / "text"), inpainting=True)
    assert isinstance(parts, InpaintingParts)
    assert not begin.network.conv_in.weight[:, 4:].any(), "at first it draws what the text model drew"
    assert parts.network.conv_in.weight[:, 4:].any(), "the new input channels are trained"
    assert [_changed(begin, parts, name) for name in ("text_encoder", "vae")] == [True, False]


def test_only_stable_diffusions_kind_becomes_an_inpainting_model(run: Callable[..., Any], tmp_path: Path) -> None:
    tiny_sdxl().save(tmp_path / "sdxl")
    with pytest.raises(RecipeError, match=r"inpainting is for models of Stable Diffusion's kind.*family sdxl"):
        run(init=str(tmp_path / "sdxl"), inpainting=True)


def test_a_model_learns_to_output_something_else(run: Callable[..., Any], tmp_path: Path) -> None:
    tiny_teacher(rescale_betas_zero_snr=True).save(tmp_path / "text")
    begin, parts, _ = run(init=str(tmp_path / "text"), prediction_type="epsilon", rescale_betas_zero_snr=False)
    assert begin.prediction_type == parts.prediction_type == "epsilon"
    assert parts.schedule.last_alpha > 0
    assert _changed(begin, parts, "unet")
    with pytest.raises(ModelError, match="epsilon cannot be used on a schedule that ends at alpha = 0"):
        run(init=str(tmp_path / "text"), prediction_type="epsilon")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"begins from a model \(init\), or .* \(vae\) or .* \(autoencoder_train\): name exactly one"),
        ({"vae": "x", "init": "x"}, "name exactly one"),
        ({"init": "models:/cats@champion"}, "init=models:/cats@champion is an alias .* name a version"),
        ({"vae": "models:/cats@champion"}, "vae=models:/cats@champion is an alias"),
        ({"vae": "x", "autoencoder": {}}, "vae names the autoencoder of a model, .*leave out autoencoder"),
        (
            {"prediction_type": "epsilon", "autoencoder_train": TRAIN},
            "prediction_type changes the model named by init, and there is none; a teacher from nothing outputs v",
        ),
        ({"inpainting": True, "autoencoder_train": TRAIN}, "inpainting changes the model named by init, and there is"),
        ({"init": "x", "network": {"second_text_width": 32}}, "second_text_width=32 is for family: sdxl"),
    ],
)
def test_teacher_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherStage(train=TRAIN, **settings)
