"""Tiny real models for tests: Stable-Diffusion-shaped, random weights, seconds to run on a CPU."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from fewstep.data.masks import MaskSettings, random_mask
from fewstep.models import (
    SCHEDULER_CONFIG,
    AutoencoderArchitecture,
    InpaintingParts,
    SDXLParts,
    StudentInfo,
    TeacherArchitecture,
    TextToImageParts,
    add_inpainting,
    fresh_text_model,
    make_student,
    save_student,
)

CAPTIONS = ["a red apple, twemoji", "two birds on blue", "a police car to the left of a tree, openmoji", "an emoji"]


def tiny_teacher(*, seed: int = 0, pooled_text: bool = False, **scheduler: object) -> TextToImageParts:
    """Return a random teacher of about 0.2 M parameters: 16 px pictures, 4 × 4 × 4 latents."""
    torch.manual_seed(seed)
    vae = AutoencoderArchitecture(resolution=16, block_out_channels=(8, 16, 16), norm_num_groups=4).build()
    architecture = TeacherArchitecture(
        block_out_channels=(16, 32),
        num_attention_heads=2,
        norm_num_groups=4,
        text_width=16,
        text_layers=1,
        text_heads=2,
        vocabulary_size=600,
        max_prompt_tokens=16,
        pooled_text=pooled_text,
    )
    tokenizer = architecture.train_tokenizer(CAPTIONS)
    return TextToImageParts(
        vae=vae,
        text_encoder=architecture.build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=architecture.build_unet(latent_channels=4, latent_size=4),
        scheduler_config={**SCHEDULER_CONFIG, **scheduler},
    ).freeze()


def tiny_teacher_folder(folder: Path) -> Path:
    """Write a tiny teacher as a diffusers folder and return it."""
    tiny_teacher().save(folder)
    return folder


def tiny_student_folder(
    folder: Path, *, num_inference_steps: int = 4, seed: int = 0, pooled_text: bool = False
) -> Path:
    """Write a tiny student whose w input has an effect, and return the folder."""
    teacher = tiny_teacher(seed=seed, pooled_text=pooled_text)
    unet = make_student(teacher.unet, embedding_dim=16)
    torch.manual_seed(seed + 1)
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.5)
    info = StudentInfo(
        stage="progressive",
        num_inference_steps=num_inference_steps,
        w_min=0.0,
        w_max=6.0,
        guidance_scale=4.0,
        teacher="tiny",
        fingerprint="test",
    )
    save_student(folder, teacher, unet.eval(), info)
    return folder


def tiny_recipe(teacher: Path, *, name: str, **changes: Any) -> dict[str, Any]:
    """Return a recipe of all stages that runs in about a minute; `changes` replace whole keys."""
    train = {"global_batch_size": 16, "learning_rate": 1e-3, "checkpoint_every": 4, "log_every": 2}
    return {
        "name": name,
        "stages": ["prepare", "encode", "guidance", "progressive", "evaluate", "register"],
        "teacher": str(teacher),
        "prepare": {
            "resolution": 16,
            "num_train": 96,
            "num_evaluate": 48,
            "num_alignment": 48,
            "samples_per_shard": 24,
            "categories": ["food-and-drink"],
        },
        "stream": {"num_streams": 4},
        "cluster": {"num_cpus": 2, "cpus_per_worker": 1},
        "guidance": {"embedding_dim": 16, "num_validation": 16, "train": {**train, "updates": 8}},
        "progressive": {"ladder": [2, 1], "train": {**train, "updates": 4}},
        "evaluate": {
            "num_prompts": 40,
            "steps": [2, 1],
            "num_bootstrap": 100,
            "reference_steps": 4,
            "guidance_scale": 3.0,
            "num_threads": 1,
        },
        "register": {"name": name, "num_inference_steps": 2, "gate": {"max_kid_ratio": 100, "min_num_images": 10}},
        **changes,
    }


def tiny_sdxl(*, seed: int = 0, force_zeros: bool = True, **scheduler: object) -> SDXLParts:
    """Return a random SDXL-shaped teacher of about 0.3 M parameters: 16 px pictures, 4 × 4 × 4 latents."""
    torch.manual_seed(seed)
    vae = AutoencoderArchitecture(resolution=16, block_out_channels=(8, 16, 16), norm_num_groups=4).build()
    architecture = TeacherArchitecture(
        family="sdxl",
        block_out_channels=(16, 32),
        num_attention_heads=2,
        norm_num_groups=4,
        text_width=16,
        second_text_width=24,
        text_layers=2,
        text_heads=2,
        vocabulary_size=600,
        max_prompt_tokens=16,
    )
    parts = fresh_text_model(architecture, vae=vae, tokenizer=architecture.train_tokenizer(CAPTIONS))
    assert isinstance(parts, SDXLParts)
    changed = {"force_zeros_for_empty_prompt": force_zeros, "scheduler_config": {**SCHEDULER_CONFIG, **scheduler}}
    return replace(parts, **changed).freeze()


def tiny_inpainting(*, seed: int = 0, **scheduler: object) -> InpaintingParts:
    """Return a random inpainting teacher of about 0.2 M parameters whose picture depends on its hole."""
    parts = add_inpainting(tiny_teacher(seed=seed, **scheduler))
    torch.manual_seed(seed + 2)
    torch.nn.init.normal_(parts.unet.conv_in.weight[:, 4:], std=0.2)
    return parts


def w_student(unet: UNet2DConditionModel, *, seed: int = 1) -> UNet2DConditionModel:
    """Return a student of a teacher's U-Net whose w input has an effect."""
    student = make_student(unet, embedding_dim=16)
    torch.manual_seed(seed)
    torch.nn.init.normal_(student.time_embedding.cond_proj.weight, std=0.5)
    return student.eval().requires_grad_(False)


def pictures_with_holes(count: int, *, side: int = 16) -> list[dict[str, Any]]:
    """Return samples as the encode stage gives them to an inpainting model: key, caption, pixels, mask."""
    generator = torch.Generator().manual_seed(5)
    small = torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=generator)
    pixels = small.repeat_interleave(side // 4, dim=2).repeat_interleave(side // 4, dim=3)
    return [
        {
            "key": f"{number:04d}",
            "caption": CAPTIONS[number % len(CAPTIONS)],
            "pixels": picture,
            "mask": random_mask(side, side, settings=MaskSettings(), generator=torch.Generator().manual_seed(number)),
        }
        for number, picture in enumerate(pixels)
    ]


def picture_samples(count: int) -> list[dict[str, Any]]:
    """Return the same pictures and captions as webdataset samples."""
    samples = []
    for sample in pictures_with_holes(count):
        file = io.BytesIO()
        Image.fromarray(sample["pixels"].permute(1, 2, 0).numpy()).save(file, format="PNG")
        samples.append({"__key__": sample["key"], "png": file.getvalue(), "txt": sample["caption"].encode()})
    return samples
