"""A teacher of another prediction type, by fine-tuning."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.diffusion import RowRandom, ddim
from fewstep.errors import ModelError, RecipeError
from fewstep.models import initial_noise, load_parts
from fewstep.stage_settings import ConvertStage
from fewstep.stages.convert import _export, _objective, converted_config
from fewstep.stages.teacher_source import TeacherSource
from fewstep.storage import Storage
from fewstep.tracking.settings import TrackingSettings
from tiny import CAPTIONS, tiny_teacher

TRAIN = {"updates": 10, "global_batch_size": 4, "learning_rate": 1e-3}


def _settings(**changes: Any) -> ConvertStage:
    return ConvertStage.model_validate({"train": TRAIN, **changes})


@pytest.fixture
def source(tmp_path: Path, storage: Storage) -> TeacherSource:
    tiny_teacher(prediction_type="epsilon", rescale_betas_zero_snr=False).save(tmp_path / "teacher")
    return TeacherSource(str(tmp_path / "teacher"), storage, TrackingSettings())


def test_an_eps_teacher_becomes_a_v_teacher_that_stock_tools_read(source: TeacherSource, tmp_path: Path) -> None:
    settings = _settings()
    objective = _objective(settings, source, torch.device("cpu"))
    teacher = load_parts(source.uri)
    batch = {
        "latent_mean": torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0)),
        "latent_std": torch.full((4, 4, 4, 4), 0.1),
        "text": teacher.encode_prompts(CAPTIONS),
    }
    optimiser = torch.optim.AdamW(objective.network.parameters(), lr=2e-3)
    errors = []
    for _ in range(30):
        loss, figures = objective.loss(objective.network, batch, RowRandom(seed=0, step=0, rows=range(4)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        errors.append(float(figures["output_mse"]))
    assert errors[-1] < 0.7 * errors[0], "it learns to output v, which it did not at first"
    _export(settings, source, objective.network, str(tmp_path / "out"))

    converted = load_parts(tmp_path / "out")
    assert converted.prediction_type == "v_prediction"
    assert converted.schedule.same_as(teacher.schedule)
    assert all(torch.equal(value, converted.vae.state_dict()[name]) for name, value in teacher.vae.state_dict().items())
    pipeline = converted.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise([3], (4, 4, 4))
    model = converted.denoiser()
    ours = ddim(
        model.guided({"text": converted.encode_prompts(CAPTIONS[:1])}, 2.0),
        noise,
        schedule=model.schedule,
        prediction_type=model.prediction_type,
        num_inference_steps=4,
    )
    theirs = pipeline(
        CAPTIONS[0], latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="latent"
    ).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


def test_the_teacher_itself_stays_as_it_is(source: TeacherSource) -> None:
    objective = _objective(_settings(), source, torch.device("cpu"))
    assert all(parameter.requires_grad for parameter in objective.network.parameters())
    assert load_parts(source.uri).prediction_type == "epsilon"


def test_zero_terminal_snr_is_added_on_demand(source: TeacherSource) -> None:
    config = converted_config(_settings(rescale_betas_zero_snr=True), source.load())
    assert config["rescale_betas_zero_snr"] is True
    assert config["prediction_type"] == "v_prediction"


def test_a_conversion_into_the_same_is_refused(source: TeacherSource) -> None:
    with pytest.raises(RecipeError, match="prediction_type=epsilon is what the teacher outputs already"):
        converted_config(_settings(prediction_type="epsilon"), source.load())


def test_eps_with_zero_terminal_snr_is_refused(source: TeacherSource) -> None:
    settings = _settings(prediction_type="epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(ModelError, match="prediction_type=epsilon cannot be used on a schedule that ends at alpha = 0"):
        converted_config(settings, source.load())


def test_workers_get_the_objective_pickled(source: TeacherSource) -> None:
    import pickle

    made = pickle.loads(pickle.dumps(partial(_objective, _settings(), source)))
    assert made(torch.device("cpu")).model.prediction_type == "v_prediction"
