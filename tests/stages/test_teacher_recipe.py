"""The teacher stage as a whole, on the emoji set: from nothing, again with other settings, and from a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from fewstep.models import add_pooled_text, load_parts
from fewstep.recipe import Recipe, parse_recipe
from fewstep.stages.context import Artifact
from fewstep.storage import Storage, join
from fewstep.tracking.fetch import fetch_model
from fewstep.workflow import run_workflow
from fewstep.workplace import Workplace
from tiny import tiny_teacher

pytestmark = [pytest.mark.usefixtures("in_process"), pytest.mark.slow]


def _recipe(**train_teacher: Any) -> Recipe:
    train = {"updates": 3, "global_batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 2}
    sizes = {"block_out_channels": [16, 32], "num_attention_heads": 2, "norm_num_groups": 4}
    texts = {"text_width": 16, "text_layers": 1, "text_heads": 2, "vocabulary_size": 600, "max_prompt_tokens": 16}
    settings = {
        "autoencoder": {"resolution": 16, "block_out_channels": [8, 16, 16], "norm_num_groups": 4},
        "autoencoder_train": train,
        "network": sizes | texts,
        "train": train,
    } | train_teacher
    prepare = {"resolution": 16, "num_train": 48, "num_evaluate": 8, "num_alignment": 8, "samples_per_shard": 16}
    return parse_recipe(
        {
            "name": "tiny-teacher",
            "stages": ["prepare", "teacher"],
            "prepare": {**prepare, "categories": ["food-and-drink"]},
            "stream": {"num_streams": 2},
            "cluster": {"num_cpus": 2, "cpus_per_worker": 1},
            "train_teacher": settings,
        }
    )


@pytest.fixture(scope="module")
def first(workplace: Workplace, in_process: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run_workflow(_recipe(), workplace, out=tmp_path_factory.mktemp("out"))["teacher"]


def _export(artifact: Artifact, storage: Storage) -> Path:
    return fetch_model(artifact.models()["teacher"], storage=storage)


def test_a_teacher_from_nothing_is_a_stable_diffusion_pipeline(first: Artifact, storage: Storage) -> None:
    assert first.facts["autoencoder"]["updates"] == first.facts["network"]["updates"] == 3
    folder = _export(first, storage)
    parts = load_parts(folder)
    assert parts.prediction_type == "v_prediction"
    assert float(parts.schedule.alphas[-1]) == 0.0
    assert any(len(token.removesuffix("</w>")) > 2 for token in parts.tokenizer.get_vocab()), "learned from captions"
    pipe = StableDiffusionPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red apple", num_inference_steps=2, guidance_scale=3.0).images[0]
    assert picture.size == (16, 16)


def test_networks_were_trained_from_the_stored_beginning(first: Artifact, storage: Storage) -> None:
    begin = load_parts(fetch_model(join(first.uri, "begin"), storage=storage))
    trained = load_parts(_export(first, storage))
    for name in ("unet", "text_encoder"):
        before, after = getattr(begin, name).state_dict(), getattr(trained, name).state_dict()
        assert any(not torch.equal(before[key], after[key]) for key in before), name
    vae, kept = begin.vae.state_dict(), trained.vae.state_dict()
    assert all(torch.equal(vae[key], kept[key]) for key in vae)
    assert begin.vae.config["scaling_factor"] == trained.vae.config["scaling_factor"] != 1.0


def test_other_network_settings_keep_the_vae(first: Artifact, workplace: Workplace, tmp_path: Path) -> None:
    train = {"updates": 2, "global_batch_size": 8, "learning_rate": 1e-3}
    again = run_workflow(_recipe(train=train), workplace, out=tmp_path)["teacher"]
    assert again.uri != first.uri
    assert again.facts["autoencoder"] == first.facts["autoencoder"]
    assert again.facts["network"]["updates"] == 2


def test_a_model_without_pooled_text_can_get_it(workplace: Workplace, tmp_path: Path) -> None:
    storage = workplace.storage
    old = tiny_teacher()
    old.save(tmp_path / "old")
    train = {"updates": 2, "global_batch_size": 8, "learning_rate": 1e-3}
    changes = {"init": str(tmp_path / "old"), "autoencoder_train": None, "train": train, "add_pooled_text": True}
    artifact = run_workflow(_recipe(**changes), workplace, out=tmp_path)["teacher"]
    begin = load_parts(fetch_model(join(artifact.uri, "begin"), storage=storage))
    new = load_parts(_export(artifact, storage))
    z, index, ids = torch.randn(2, 4, 4, 4), torch.tensor([999, 300]), old.token_ids(["a red apple", ""])
    text = old.text_encoder(ids).last_hidden_state
    with torch.no_grad():
        before, same = (unet(z, index, text, return_dict=False)[0] for unet in (old.unet, begin.unet))
    assert torch.equal(before, same), "the new input must change nothing before it is trained"
    assert float(new.unet.add_embedding.norm2.weight.abs().max()) > 0, "and be trained"
    torch.manual_seed(_recipe(**changes).seed)
    fresh = add_pooled_text(old.unet, num_heads=2).state_dict()
    assert all(torch.equal(fresh[key], weight) for key, weight in begin.unet.state_dict().items()), "by the seed"


def test_a_model_is_trained_on_with_its_own_vae(first: Artifact, workplace: Workplace, tmp_path: Path) -> None:
    storage = workplace.storage
    begin = join(first.uri, "export")
    # A rate of almost nothing: the weights must stay those of the model named.
    train = {"updates": 2, "global_batch_size": 8, "learning_rate": 1e-9, "weight_decay": 0.0}
    again = run_workflow(_recipe(init=begin, autoencoder_train=None, train=train), workplace, out=tmp_path)["teacher"]
    assert "autoencoder" not in again.facts
    old, new = load_parts(_export(first, storage)), load_parts(_export(again, storage))
    for name in ("unet", "text_encoder", "vae"):
        before, after = getattr(old, name).state_dict(), getattr(new, name).state_dict()
        assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before), name
    assert new.tokenizer.get_vocab() == old.tokenizer.get_vocab()
