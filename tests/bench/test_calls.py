"""The bare calls are the very calls of our own code, and their FLOPs are the known ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bench import CPU, settings, tiny_workload
from torch import nn

from fewstep.bench.calls import SampleCalls, UpdateCalls, sample_flops, update_flops
from fewstep.bench.sample import student_parts, teacher_parts
from fewstep.bench.sd15 import sd15_parts, sd15_train_workload
from fewstep.bench.settings import Stage
from fewstep.bench.train import make_objective
from fewstep.bench.workload import TrainWorkload, on_device
from fewstep.diffusion.random import RowRandom
from fewstep.models import Parts, load_model, load_parts
from fewstep.plan.network import Network, forward_pass
from fewstep.plan.shapes import shape_of_folder
from fewstep.serve.sample import sample_pixels
from tiny import tiny_inpainting, tiny_sdxl, tiny_student_folder, tiny_teacher
from tiny_classes import tiny_class_model, tiny_dit

FAMILIES: dict[str, Callable[[], Any]] = {
    "sdxl": tiny_sdxl,
    "inpainting": tiny_inpainting,
    "class_pixel": tiny_class_model,
    "class_latent": partial(tiny_class_model, latent=True),
    "dit": tiny_dit,
}


def workload_of(parts: Parts, folder: Path) -> TrainWorkload:
    """Return the training of a model on made samples of its shape."""
    parts.save(folder)
    shape = shape_of_folder(folder)
    return replace(
        tiny_workload(),
        sample_shape=shape.sample_shape,
        conditions=shape.conditions,
        in_pixels=not parts.stores_latents,
        build=partial(on_device, load_model(folder).denoiser()),
    )


def record(**networks: nn.Module) -> list[tuple[Any, ...]]:
    """Return a list that fills with (name, shape of the first input, with gradients?) at every forward pass."""
    calls: list[tuple[Any, ...]] = []

    def note(name: str) -> Any:
        return lambda _, args: calls.append((name, tuple(args[0].shape), torch.is_grad_enabled()))

    for name, network in networks.items():
        network.register_forward_pre_hook(note(name))
    return calls


@pytest.mark.parametrize("stage", ["guidance", "progressive"])
@pytest.mark.parametrize("family", ["text", "sdxl", "inpainting", "class_pixel", "class_latent", "dit"])
def test_update_makes_the_calls_of_the_objective(stage: Stage, family: str, tmp_path: Path) -> None:
    workload = tiny_workload() if family == "text" else workload_of(FAMILIES[family](), tmp_path)
    objective = make_objective(workload, settings(stage=stage), CPU)
    bare = UpdateCalls.make(
        stage,
        objective.of_teacher,
        objective.network,
        batch_size=4,
        sample_shape=workload.sample_shape,
        conditions=workload.conditions,
    )
    made = record(teacher=objective.teacher, student=objective.network)
    batch = next(iter(workload.batch_factory(4)(rank=0, world_size=1)))
    random = RowRandom(seed=0, step=0, rows=batch.rows)
    objective.loss(objective.network, batch.data, random)[0].backward()
    ours = list(made)
    made.clear()
    bare.loss().backward()
    assert made == ours
    assert {name for name, *_ in ours} == {"teacher", "student"}


# Not of so small a DiT: its input for w, which the plan leaves out, is a quarter of it.
@pytest.mark.parametrize("family", ["sdxl", "inpainting", "class_pixel"])
def test_flops_of_every_family_are_those_of_the_plan(family: str, tmp_path: Path) -> None:
    workload = workload_of(FAMILIES[family](), tmp_path)
    flops = update_flops(
        "guidance",
        workload.build,
        embedding_dim=16,
        sample_shape=workload.sample_shape,
        conditions=workload.conditions,
    )
    assert flops.parameters > 0
    planned = forward_pass(Network.of(shape_of_folder(tmp_path)), bfloat16=False)
    assert flops.forward == pytest.approx(planned.flops, rel=0.02)


def test_sample_makes_the_calls_of_the_sampler(tmp_path: Path) -> None:
    parts = load_parts(tiny_student_folder(tmp_path / "student"))
    bare = SampleCalls.make(parts, batch_size=2, num_inference_steps=3)
    made = record(text=parts.text_encoder, unet=parts.unet, decoder=parts.vae.decoder)
    sample_pixels(parts, prompts=["a", "b"], seeds=[0, 1], num_inference_steps=3, w=torch.ones(2))
    ours = [(name, shape) for name, shape, _ in made]
    made.clear()
    bare.run()
    assert [(name, shape) for name, shape, _ in made] == ours
    assert [name for name, _ in ours] == ["text", "unet", "unet", "unet", "decoder"]


def test_flops_of_stable_diffusion_15() -> None:
    """Known figures at 512 px: 803.3 GFLOP forward, 4,013 for stage one, 5,741 for four steps with text and decoder."""
    workload = sd15_train_workload(512)
    flops = update_flops(
        "guidance",
        workload.build,
        embedding_dim=256,
        sample_shape=workload.sample_shape,
        conditions=workload.conditions,
    )
    assert flops.parameters == pytest.approx(859.6e6, rel=1e-4)
    assert flops.forward / 1e9 == pytest.approx(803.3, rel=0.01)
    assert flops.update / 1e9 == pytest.approx(4013, rel=0.01)

    parts = student_parts(sd15_parts(torch.device("meta"), torch.float32))
    four = SampleCalls.make(parts, batch_size=3, num_inference_steps=4)
    assert sample_flops(four) / 1e9 == pytest.approx(5741, rel=0.01)


def test_both_stages_cost_the_same() -> None:
    """Two branches in one batch, or two steps one after the other: 2 forward passes, and one with its backward."""
    workload = tiny_workload()
    one, two = (
        update_flops(
            stage,
            workload.build,
            embedding_dim=16,
            sample_shape=workload.sample_shape,
            conditions=workload.conditions,
        )
        for stage in ("guidance", "progressive")
    )
    assert two.update == pytest.approx(one.update, rel=0.01)
    assert 4.5 < one.update / one.forward <= 5.05


def test_student_and_teacher_of_one_model(tmp_path: Path) -> None:
    student = load_parts(tiny_student_folder(tmp_path / "student"))
    assert student_parts(student) is student
    teacher = teacher_parts(student)
    assert teacher.unet.config.time_cond_proj_dim is None
    assert torch.equal(teacher.unet.conv_in.weight, student.unet.conv_in.weight)
    made = student_parts(tiny_teacher())
    assert made.unet.config.time_cond_proj_dim == 256
    assert not any(weight.requires_grad for weight in made.unet.parameters())
