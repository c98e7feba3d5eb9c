"""Diffusion transformers: diffusers' own network with an input for w, and its folder for DiTPipeline and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from torch import Tensor

from counted import counted
from fewstep.diffusion import RowRandom
from fewstep.diffusion.schedulers import StochasticDDIMScheduler
from fewstep.distill import GuidanceObjective, ProgressiveObjective
from fewstep.errors import ModelError, SamplingError
from fewstep.models import (
    ConditionedDiT,
    DiTParts,
    DiTStudentPipeline,
    SeededNoise,
    copy_unet,
    guidance_embedding,
    initial_noise,
    load_model,
    make_student,
    read_student_info,
    sample_student,
    save_student,
)
from fewstep.models.lora import LoraSettings, lora_student
from tiny_classes import class_student, some_inputs, student_folder, student_info, tiny_class_model, tiny_dit

SEEDS = (5, 6)


@pytest.fixture(scope="module")
def parts() -> DiTParts:
    return tiny_dit()


def _plain(network: ConditionedDiT) -> DiTTransformer2DModel:
    config = {key: value for key, value in network.config.items() if key[0] != "_" and key != "time_cond_proj_dim"}
    plain = DiTTransformer2DModel(**config)
    plain.load_state_dict(network.state_dict())
    return plain.eval()


def _generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
@pytest.mark.parametrize("learned_sigma", [True, False])
def test_without_w_it_is_diffusers_network_bit_for_bit(learned_sigma: bool) -> None:
    parts = tiny_dit(learned_sigma=learned_sigma)
    z, time, condition = some_inputs(parts)
    theirs = _plain(parts.transformer)(z, time, condition["label"]).sample
    assert theirs.shape[1] == (8 if learned_sigma else 4)
    assert torch.equal(parts.transformer(z, time, condition["label"]).sample, theirs)
    assert torch.equal(parts.denoiser().conditional(condition)(z, time), theirs[:, :4])


@torch.no_grad()
def test_guidance_is_against_the_networks_own_null_label(parts: DiTParts) -> None:
    z, time, condition = some_inputs(parts)
    plain, w = _plain(parts.transformer), 2.0
    with_class = plain(z, time, condition["label"]).sample[:, :4]
    without = plain(z, time, torch.full((3,), 3)).sample[:, :4]
    guided = parts.denoiser().guided(condition, w)(z, time)
    torch.testing.assert_close(guided, (1 + w) * with_class - w * without, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("embedding_dim", [16, None])
def test_a_new_student_is_the_conditional_teacher_bit_for_bit(parts: DiTParts, embedding_dim: int | None) -> None:
    z, time, condition = some_inputs(parts)
    student = make_student(parts.transformer, embedding_dim=embedding_dim)
    assert student.config["time_cond_proj_dim"] == embedding_dim
    assert student.training
    model = parts.denoiser().with_network(student)
    # In training mode: nothing is dropped there, labels included.
    assert torch.equal(model.conditional(condition, 2.5)(z, time), parts.denoiser().conditional(condition)(z, time))
    with pytest.raises(ModelError, match=r"already conditioned on w .*time_cond_proj_dim=16"):
        make_student(make_student(parts.transformer, embedding_dim=16))


@torch.no_grad()
def test_w_enters_as_in_diffusers_unets(parts: DiTParts) -> None:
    z, time, condition = some_inputs(parts)
    student = class_student(parts.transformer)
    copied = copy_unet(student)
    w = guidance_embedding(torch.tensor([0.0, 1.0, 3.0]), 16)
    output = student(z, time, condition["label"], timestep_cond=w).sample
    assert torch.equal(copied(z, time, condition["label"], timestep_cond=w).sample, output)
    # What each block's embedding must be, from diffusers' parts alone.
    for block in student.transformer_blocks:
        emb = block.norm1.emb
        told = emb.time_proj(time) + w @ emb.timestep_embedder.cond_proj.weight.T
        hidden = emb.timestep_embedder.linear_2(emb.timestep_embedder.act(emb.timestep_embedder.linear_1(told)))
        expected = hidden + emb.class_embedder.embedding_table(condition["label"])
        torch.testing.assert_close(emb((time, w), condition["label"], hidden_dtype=torch.float32), expected)
    low, high = (student(z, time, condition["label"], timestep_cond=w[[i] * 3]).sample for i in (0, 2))
    assert float((low - high).abs().max()) > 1e-3


def test_w_that_is_missing_or_unwanted_is_told(parts: DiTParts) -> None:
    z, time, condition = some_inputs(parts)
    with pytest.raises(ModelError, match="time_cond_proj_dim=16, and no embedding of w came"):
        class_student(parts.transformer)(z, time, condition["label"])
    with pytest.raises(ModelError, match="time_cond_proj_dim=None, and an embedding of w came"):
        parts.transformer(z, time, condition["label"], timestep_cond=torch.zeros(3, 16))


@pytest.mark.parametrize("prediction_type", [None, "v_prediction"])
def test_stage_one_trains_the_first_half_alone(parts: DiTParts, prediction_type: Any) -> None:
    objective = GuidanceObjective(
        parts.denoiser(), w_min=0.0, w_max=4.0, embedding_dim=16, prediction_type=prediction_type
    )
    z, _, condition = some_inputs(parts)
    batch = {"latent_mean": z, "latent_std": torch.full_like(z, 0.1), **condition}
    trained = dict(objective.network.named_parameters())
    gradients: dict[bool, dict[str, Tensor]] = {}
    for checkpointing in (False, True):
        if checkpointing:
            objective.network.enable_gradient_checkpointing()
        objective.network.zero_grad()
        loss, _ = objective.loss(objective.network, batch, RowRandom(seed=0, step=0, rows=range(3)))
        loss.backward()
        gradients[checkpointing] = {
            name: weight.grad.clone()
            for name, weight in objective.network.named_parameters()
            if weight.grad is not None
        }
    assert set(gradients[False]) == set(gradients[True]) == set(trained)
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient, rtol=0, atol=1e-6)
    # (patch row, patch column, channel)
    last = gradients[True]["proj_out_2.weight"].view(2, 2, 8, -1)
    assert float(last[:, :, 4:].abs().max()) == 0 < float(last[:, :, :4].abs().max())
    assert all(
        float(gradients[True][f"transformer_blocks.{n}.norm1.emb.timestep_embedder.cond_proj.weight"].abs().max()) > 0
        for n in range(2)
    )


def test_the_unmodified_pipeline_of_the_teachers_folder_samples_as_ours(tmp_path: Path) -> None:
    # DiTPipeline takes 1000 for no class.
    teacher = tiny_dit(num_classes=1000)
    teacher.save(tmp_path)
    pipeline = _quiet(DiTPipeline.from_pretrained(tmp_path))
    assert type(pipeline.transformer) is DiTTransformer2DModel
    assert pipeline.get_label_ids(["class 7"]) == [7]
    read = load_model(tmp_path)
    assert isinstance(read, DiTParts)
    assert read.class_names == teacher.class_names
    with counted(pipeline.transformer) as calls:
        images = pipeline(
            [3, 999], guidance_scale=2.5, num_inference_steps=4, generator=_generators(), output_type="pt"
        ).images
    assert calls == [4] * 4
    z = sample_student(
        read.denoiser(),
        None,
        initial_noise(SEEDS, read.sample_shape),
        {"label": torch.tensor([3, 999])},
        w=1.5,
        num_inference_steps=4,
    )
    torch.testing.assert_close(images, (teacher.vae.decode(z / 0.7).sample / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["deterministic", "stochastic"])
def test_a_students_folder_samples_as_ours_with_one_call_a_step(parts: DiTParts, tmp_path: Path, kind: Any) -> None:
    folder = student_folder(tmp_path / "student", parts, kind=kind)
    pipeline = _quiet(DiTStudentPipeline.from_pretrained(folder))
    if kind == "stochastic":
        pipeline.scheduler = StochasticDDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    own, info = load_model(folder), read_student_info(folder)
    assert info is not None
    assert isinstance(own, DiTParts)
    assert own.class_names == parts.class_names
    with counted(pipeline.transformer) as calls:
        theirs = pipeline(
            [2, 0], num_inference_steps=4, guidance_scale=2.5, generator=_generators(), output_type="latent"
        ).images
    assert calls == [2] * 4
    noise = SeededNoise(SEEDS, own.sample_shape)
    ours = sample_student(
        own.denoiser(),
        info,
        noise.draw(),
        {"label": torch.tensor([2, 0])},
        w=1.5,
        noise=lambda step: noise.draw(),
    )
    # An untrained network of eps reaches values of hundreds.
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    pictures = pipeline([2, 0], num_inference_steps=4, guidance_scale=2.5, latents=initial_noise(SEEDS, (4, 4, 4)))
    assert [picture.size for picture in pictures.images] == [(8, 8), (8, 8)]
    with pytest.raises(SamplingError, match=r"class_labels has \[3\], and the classes of this model are 0 … 2"):
        pipeline([3])


def test_a_student_of_one_w_is_a_dit_pipeline_without_guidance(parts: DiTParts, tmp_path: Path) -> None:
    student = make_student(parts.transformer, embedding_dim=None)
    save_student(tmp_path, parts, student, student_info(2, w=1.0), prediction_type="v_prediction")
    pipeline = _quiet(DiTPipeline.from_pretrained(tmp_path))
    images = pipeline(
        [1, 2], guidance_scale=1.0, num_inference_steps=2, generator=_generators(), output_type="pt"
    ).images
    own = load_model(tmp_path)
    assert isinstance(own, DiTParts)
    assert own.prediction_type == "v_prediction"
    noise, condition = initial_noise(SEEDS, own.sample_shape), {"label": torch.tensor([1, 2])}
    z = sample_student(own.denoiser(), student_info(2, w=1.0), noise, condition, w=1.0)
    torch.testing.assert_close(images, (own.vae.decode(z / 0.7).sample / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_folders_of_diffusers_first_class_for_it_are_read(parts: DiTParts, tmp_path: Path) -> None:
    parts.save(tmp_path)
    file = tmp_path / "transformer" / "config.json"
    old = {"_class_name": "Transformer2DModel", "cross_attention_dim": None, "num_vector_embeds": None}
    file.write_text(json.dumps({**json.loads(file.read_text()), **old}))
    z, time, condition = some_inputs(parts)
    read = load_model(tmp_path).denoiser()
    assert torch.equal(read.guided(condition, 1.0)(z, time), parts.denoiser().guided(condition, 1.0)(z, time))


def _name_some(index: dict[str, Any]) -> None:
    del index["id2label"]["1"]


def _name_too_many(index: dict[str, Any]) -> None:
    index["id2label"]["3"] = "nothing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_name_some, r"names 2 classes, 0 … 2: it must name every class from 0 on"),
        (_name_too_many, "4 classes have names and the network knows 3"),
    ],
)
def test_names_that_do_not_fit_are_refused(
    parts: DiTParts, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    parts.save(tmp_path)
    file = tmp_path / "model_index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


def test_parts_that_do_not_fit_are_refused(parts: DiTParts) -> None:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 4}
    with pytest.raises(ModelError, match="takes 4 channels and outputs 6: it must be as many, or twice as many"):
        replace(parts, transformer=ConditionedDiT(**sizes, num_embeds_ada_norm=3, out_channels=6))
    with pytest.raises(ModelError, match="takes 3 channels but the VAE has latents of 4"):
        replace(parts, transformer=ConditionedDiT(**sizes, num_embeds_ada_norm=3, in_channels=3))
    zero = replace(parts, scheduler_config={**parts.scheduler_config, "rescale_betas_zero_snr": True})
    with pytest.raises(ModelError, match="zero_snr"):
        GuidanceObjective(zero.denoiser(), w_min=0.0, w_max=1.0)


def test_what_needs_a_unet_is_told(parts: DiTParts) -> None:
    with pytest.raises(ModelError, match="a ConditionedDiT has none: take mse or pseudo_huber"):
        ProgressiveObjective(
            parts.denoiser(), guided_teacher=True, num_inference_steps=2, w_min=0.0, w_max=1.0, error="features"
        )

    with pytest.raises(ModelError, match=r"lora puts adapters on U-Nets, and .* on a ConditionedDiT: leave lora out"):
        lora_student(parts.transformer, LoraSettings(rank=2))


@torch.no_grad()
def test_half_precision_is_near(parts: DiTParts) -> None:
    z, time, condition = some_inputs(parts)
    student = parts.with_network(class_student(parts.transformer), parts.scheduler_config)
    exact = student.denoiser().conditional(condition, 1.5)(z, time)
    half = student.to("cpu", torch.bfloat16).denoiser().conditional(condition, 1.5)(z, time)
    assert half.dtype == torch.float32
    assert float((half - exact).norm() / exact.norm()) < 0.05
    pipeline = _quiet(student.pipeline())
    assert pipeline([1], num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)


def test_a_unets_weights_are_told_apart(tmp_path: Path, parts: DiTParts) -> None:
    parts.save(tmp_path)
    tiny_class_model(latent=True).unet.save_pretrained(tmp_path / "transformer")
    with pytest.raises(ModelError, match="is a UNet2DConditionModel, and a DiT is one of DiTTransformer2DModel"):
        load_model(tmp_path)
