"""One rung of the ladder, trained from samples in memory with one option at a time; for `fewstep bench options`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fewstep.data.emoji.dataset import EmojiSettings, emoji_samples
from fewstep.data.part import stack_samples
from fewstep.data.pictures import decode_picture
from fewstep.data.stream import Batch
from fewstep.diffusion import ddim
from fewstep.distill import ProgressiveObjective
from fewstep.errors import RecipeError
from fewstep.models import Denoiser, Parts, StudentInfo, initial_noise
from fewstep.models.lora import LoraSettings, lora_student
from fewstep.train.checkpoint import load_state
from fewstep.train.in_process import LocalHost
from fewstep.train.job import TrainJob
from fewstep.train.loop import train
from fewstep.train.settings import TrainSettings

BASELINE, OTHER_SEED = "baseline (mse)", "baseline, another seed"
_AT_ONCE = 64


@dataclass(frozen=True)
class Variant:
    """One option of the ladder.

    Attributes:
        source: where it comes from.
        objective: keyword arguments of `ProgressiveObjective`.
        train: settings of the training that differ.
        lora_rank: rank of adapters; None trains all weights.
        seed: added to the seed of the training.
    """

    source: str
    objective: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    lora_rank: int | None = None
    seed: int = 0


#: The average is that of the baseline's own training. Adapters learn at a higher rate than whole weights, as in
#: LCM-LoRA's script; at the same one they hardly move in so few updates.
VARIANTS: Mapping[str, Variant] = {
    BASELINE: Variant("Meng et al. 2023", train={"ema_decay": 0.98}),
    OTHER_SEED: Variant("how far chance goes", seed=1),
    "pseudo_huber": Variant("Song & Dhariwal 2024", {"error": "pseudo_huber"}),
    "features": Variant("Zhang et al. 2018, Kang et al. 2024", {"error": "features"}),
    "denoising_weight 0.2": Variant("Li et al. 2023 (SnapFusion)", {"denoising_weight": 0.2}),
    "trajectory_inputs": Variant("Habibian et al. 2024, AGD", {"trajectory_inputs": True}),
    "lora rank 16": Variant("Luo et al. 2023 (LCM-LoRA)", train={"learning_rate": 2e-3}, lora_rank=16),
    "features, weight 4": Variant("as features", {"error": "features", "feature_weight": 4.0}),
}


class OptionsSettings(BaseModel):
    """What is trained and measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: str = Field("asset:emoji-teacher", description="MODEL whose guided pictures are the reference")
    student: str = Field("asset:emoji-student-4", description="MODEL that teaches the rung, w-conditioned")
    num_inference_steps: int = Field(2, ge=1, description="steps of the rung")
    updates: int = Field(200, ge=1, description="updates of each training")
    batch_size: int = Field(32, ge=1, description="samples per update")
    learning_rate: float = Field(3e-4, gt=0, description="peak rate; falls linearly to 0")
    num_train: int = Field(4000, ge=1, description="scenes of the emoji set to train on, kept in memory as latents")
    num_prompts: int = Field(256, ge=20, description="held-out prompts to measure on")
    num_real: int = Field(600, ge=20, description="held-out real pictures")
    categories: tuple[str, ...] = Field(("food-and-drink", "animals-and-nature"), description="of the emoji set")
    guidance_scale: float = Field(3.0, ge=1, description="1 + w of the measured pictures")
    reference_steps: int = Field(50, ge=1, description="guided steps of the teacher's reference")
    num_bootstrap: int = Field(1000, ge=100, description="draws of the intervals")
    num_threads: int = Field(1, ge=1, description="CPU threads")
    seed: int = Field(0, description="seed of everything")
    variants: tuple[str, ...] = Field(tuple(VARIANTS)[:-1], min_length=1, description="rows, among them the baseline")


@dataclass
class RungData:
    """What is trained on and what is measured on.

    Attributes:
        train: samples in memory, by name.
        condition: of the held-out prompts.
        noise: starting noise of the held-out prompts, (N, C, h, w).
        real: held-out real pictures, uint8 (M, 3, H, W).
    """

    train: dict[str, Tensor]
    condition: dict[str, Tensor]
    noise: Tensor
    real: Tensor

    def sample(self, draw: Callable[[dict[str, Tensor], Tensor], Tensor]) -> Tensor:
        """Return what `draw` makes of (condition, noise) of all held-out prompts, (N, C, h, w)."""
        parts = [slice(start, start + _AT_ONCE) for start in range(0, len(self.noise), _AT_ONCE)]
        return torch.cat([draw({n: v[rows] for n, v in self.condition.items()}, self.noise[rows]) for rows in parts])


def make_data(settings: OptionsSettings, teacher: Parts) -> RungData:
    """Draw the emoji set and encode it with the teacher's parts."""
    scenes = EmojiSettings(
        resolution=teacher.resolution,
        categories=settings.categories,
        num_train=settings.num_train,
        num_evaluate=max(settings.num_real, settings.num_prompts),
    )
    decode = partial(decode_picture, resolution=teacher.resolution)
    held_out = [decode(sample) for sample in emoji_samples(scenes, "evaluate")]
    prompts = held_out[: settings.num_prompts]
    encoded: list[dict[str, Tensor]] = []
    samples = [decode(sample) for sample in emoji_samples(scenes, "train")]
    for start in range(0, len(samples), _AT_ONCE):
        rows = samples[start : start + _AT_ONCE]
        mean, std = teacher.encode_pictures(stack_samples(rows)["pixels"])
        encoded.append({"latent_mean": mean, "latent_std": std, **teacher.conditions(rows)})
    return RungData(
        train={name: torch.cat([batch[name] for batch in encoded]) for name in encoded[0]},
        condition=dict(teacher.conditions(prompts)),
        noise=initial_noise(range(len(prompts)), teacher.sample_shape),
        real=stack_samples(held_out[: settings.num_real])["pixels"],
    )


@dataclass(frozen=True)
class TrainedRung:
    """What a training ended with: its network, one of the averaged weights if it kept them, and what it took."""

    network: nn.Module
    averaged: nn.Module | None
    cpu_seconds_per_update: float
    trained_weights: int


def train_rung(
    variant: Variant, settings: OptionsSettings, student: Parts, info: StudentInfo, data: RungData
) -> TrainedRung:
    """Train the rung with one option, from `student` as its teacher."""
    values: dict[str, Any] = {
        "updates": settings.updates,
        "global_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "checkpoint_every": settings.updates,
        **variant.train,
    }
    seed = settings.seed + variant.seed
    job = TrainJob(
        name="rung",
        fingerprint="rung",
        objective=partial(_objective, variant, settings, student.denoiser(), info),
        batches=partial(_MemoryBatches, data.train, batch_size=settings.batch_size, seed=seed),
        export=_export_nothing,
        settings=TrainSettings(**values),
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        host = LocalHost(device=torch.device("cpu"), folder=folder, num_to_keep=1, on_log=None)
        began = time.process_time()
        network = train(job, host).network.eval()
        seconds = time.process_time() - began
        average = load_state(str(next(Path(folder, "checkpoints").glob("update-*")))).ema
    averaged = None
    if average is not None:
        averaged = job.objective(torch.device("cpu")).network.eval()
        averaged.load_state_dict({**network.state_dict(), **average})
    trained = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    return TrainedRung(network, averaged, seconds / settings.updates, trained)


def sample_rung(model: Denoiser, network: Any, data: RungData, *, num_inference_steps: int, w: float) -> Tensor:
    """Return the latents that a w-conditioned network of N steps makes of the held-out prompts."""
    named = model.with_network(network)
    return data.sample(
        lambda condition, noise: ddim(
            named.conditional(condition, w),
            noise,
            schedule=model.schedule,
            prediction_type=model.prediction_type,
            num_inference_steps=num_inference_steps,
        )
    )


def sample_guided(model: Denoiser, data: RungData, *, num_inference_steps: int, w: float) -> Tensor:
    """Return the latents that the guided teacher makes of the held-out prompts."""
    return data.sample(
        lambda condition, noise: ddim(
            model.guided(condition, w),
            noise,
            schedule=model.schedule,
            prediction_type=model.prediction_type,
            num_inference_steps=num_inference_steps,
        )
    )


class _MemoryBatches:
    """Endless batches of samples that are kept in memory, drawn by the seed: a BatchSource."""

    def __init__(self, data: Mapping[str, Tensor], *, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self._data, self._rows, self._seed = data, list(range(rank, batch_size, world_size)), seed
        self._batch_size, self._position = batch_size, 0

    def load_state(self, state: dict[str, Any]) -> None:
        self._position = int(state["streams"]["0"][1])

    def __iter__(self) -> Iterator[Batch]:
        count = len(next(iter(self._data.values())))
        while True:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._position)
            chosen = torch.randint(count, (self._batch_size,), generator=generator)[self._rows]
            self._position += 1
            yield Batch(
                data={name: value[chosen] for name, value in self._data.items()},
                rows=self._rows,
                state={"streams": {"0": [0, self._position]}},
                counts={},
            )


def _objective(
    variant: Variant, settings: OptionsSettings, model: Denoiser, info: StudentInfo, device: torch.device
) -> ProgressiveObjective:
    if info.num_inference_steps is None:
        raise RecipeError(f"student={settings.student} is of stage one, made for no number of steps: name a rung")
    trained = None
    if variant.lora_rank is not None:
        trained = lora_student(model.network, LoraSettings(rank=variant.lora_rank))
    return ProgressiveObjective(
        model,
        num_inference_steps=settings.num_inference_steps,
        teacher_steps=info.num_inference_steps,
        w_min=info.w_min,
        w_max=info.w_max,
        student=trained,
        **variant.objective,
    )


def _export_nothing(network: nn.Module, folder: str) -> None:
    """Keep nothing: the networks are measured as they are."""
