"""Class-conditional models small enough for tests: random weights, seconds to run on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models import (
    COSINE_CONFIG,
    AutoencoderArchitecture,
    ClassArchitecture,
    ClassModel,
    ClassParts,
    ConditionedDiT,
    DiTParts,
    StudentInfo,
    StudentKind,
    make_student,
    save_student,
)

NAMES = ("cat", "dog", "owl")

#: DiT's betas, on the times that students are made for.
DIT_CONFIG: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "clip_sample": False,
}


def tiny_class_model(*, latent: bool = False, seed: int = 0, dropout: float = 0.0) -> ClassParts:
    """Return a random class-conditional U-Net of three classes: grey pictures of 8 px, or 4 × 4 × 4 latents of them."""
    torch.manual_seed(seed)
    architecture = ClassArchitecture(
        num_classes=len(NAMES),
        resolution=8,
        channels=1,
        block_out_channels=(8, 16),
        attention_from_level=1,
        attention_head_dim=8,
        norm_num_groups=4,
        dropout=dropout,
    )
    vae = _vae(channels=1) if latent else None
    unet = architecture.build_unet(in_channels=4 if latent else 1, sample_size=4 if latent else 8)
    # Fresh class embeddings are as small as the time's, and would hardly show.
    nn.init.normal_(unet.class_embedding.weight, std=0.5)
    config = {**COSINE_CONFIG, "clip_sample": not latent}
    return ClassParts(unet=unet, scheduler_config=config, vae=vae, class_names=NAMES).freeze()


def tiny_dit(*, seed: int = 0, num_classes: int = 3, learned_sigma: bool = True, **scheduler: Any) -> DiTParts:
    """Return a random DiT of two blocks: pictures of 8 px, 4 × 4 × 4 latents."""
    torch.manual_seed(seed)
    network = ConditionedDiT(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8 if learned_sigma else 4,
        num_layers=2,
        sample_size=4,
        num_embeds_ada_norm=num_classes,
    )
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.15)
    config = {**DIT_CONFIG, **scheduler}
    return DiTParts(
        transformer=network,
        vae=_vae(channels=3),
        scheduler_config=config,
        class_names=tuple(f"class {number}" for number in range(num_classes)),
    ).freeze()


def class_student(network: Any, *, seed: int = 1) -> Any:
    """Return a student of a network whose w input has an effect."""
    student = make_student(network, embedding_dim=16)
    torch.manual_seed(seed)
    for name, weight in student.named_parameters():
        if name.endswith("cond_proj.weight"):
            nn.init.normal_(weight, std=0.5)
    return student.eval().requires_grad_(False)


def student_info(steps: int | None, *, kind: StudentKind = "deterministic", w: float | None = None) -> StudentInfo:
    """Return what a student of these tests says of itself; a w makes it one of a single weight."""
    w_min, w_max = (0.0, 4.0) if w is None else (w, w)
    stage = "guidance" if steps is None else "progressive"
    return StudentInfo(stage, steps, w_min, w_max, 1 + (w_min + w_max) / 2, "tiny", "test", kind=kind)


def student_folder(folder: Path, teacher: ClassModel, *, kind: StudentKind = "deterministic", steps: int = 4) -> Path:
    """Write a student's folder and return it."""
    save_student(folder, teacher, class_student(teacher.network), student_info(steps, kind=kind))
    return folder


def some_inputs(parts: ClassModel, *, rows: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return states, times and labels of a model."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(rows, *parts.sample_shape, generator=generator)
    time = parts.schedule.times(10)[torch.tensor([10, 4, 1])[:rows]]
    return z, time, {"label": torch.tensor([0, 2, 1])[:rows]}


def _vae(*, channels: int) -> Any:
    architecture = AutoencoderArchitecture(resolution=8, block_out_channels=(8, 16), norm_num_groups=4)
    vae = architecture.build(channels=channels)
    vae.register_to_config(scaling_factor=0.7)
    return vae
