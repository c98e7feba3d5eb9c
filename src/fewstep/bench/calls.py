"""The bare network calls of our own code in a plain loop, and what they cost in FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel

from fewstep.bench.batches import make_condition
from fewstep.bench.device import Elapsed, Stopwatch
from fewstep.bench.settings import Precision, Stage
from fewstep.models import Denoiser, TextToImageParts
from fewstep.models.architecture import unet_like
from fewstep.models.denoiser import Forward


@dataclass(frozen=True)
class UpdateCalls:
    """The network calls of one update on a fixed batch: the teacher's forwards, the student's forward and backward.

    Stage one calls the teacher once with 2B rows (both branches), stage two twice with B rows.

    Attributes:
        stage: whose calls.
        forward: how the family calls a network.
        teacher, student: the networks.
        z, time: (B, C, h, w) and (B,).
        condition: B rows.
        w_embedding: (B, D).
    """

    stage: Stage
    forward: Forward
    teacher: nn.Module
    student: nn.Module
    z: Tensor
    time: Tensor
    condition: dict[str, Tensor]
    w_embedding: Tensor

    @classmethod
    def make(
        cls,
        stage: Stage,
        model: Denoiser,
        student: Any,
        *,
        batch_size: int,
        sample_shape: tuple[int, int, int],
        conditions: Mapping[str, tuple[int, ...]],
    ) -> UpdateCalls:
        """Return the calls on a random batch, on the student's device.

        Args:
            stage: whose calls.
            model: the teacher.
            student: its network.
            batch_size: B.
            sample_shape, conditions: of a sample.
        """
        device = student.device
        made = make_condition(batch_size, conditions)
        return cls(
            stage=stage,
            forward=model.forward,
            teacher=model.network,
            student=student,
            z=torch.randn(batch_size, *sample_shape, device=device),
            time=torch.randint(0, 1000, (batch_size,), device=device),
            condition={
                name: (value.float() if value.is_floating_point() else value).to(device) for name, value in made.items()
            },
            w_embedding=torch.randn(batch_size, student.config["time_cond_proj_dim"], device=device),
        )

    def loss(self) -> Tensor:
        """Make the forward calls and return a scalar of the student's output."""
        z, time, condition, w = self.z, self.time, self.condition, self.w_embedding
        with torch.no_grad():
            if self.stage == "guidance":
                both = {name: torch.cat([value, value]) for name, value in condition.items()}
                self.forward(self.teacher, torch.cat([z, z]), torch.cat([time, time]), both, None)
            else:
                for _ in range(2):
                    self.forward(self.teacher, z, time, condition, w)
        return self.forward(self.student, z, time, condition, w).float().square().mean()

    def run(self, updates: int, *, warmup: int, optimizer: torch.optim.Optimizer, precision: Precision) -> Elapsed:
        """Return the time of `updates` optimiser updates, after some that are not counted."""
        device = self.z.device
        watch = Stopwatch(device)
        for update in range(warmup + updates):
            if update == warmup:
                watch = Stopwatch(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
                loss = self.loss()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        elapsed = watch.stop()
        optimizer.zero_grad(set_to_none=True)
        return elapsed


@dataclass(frozen=True)
class SampleCalls:
    """The network calls of one batch of pictures: the text encoder, N times the student's U-Net, the VAE's decoder."""

    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    num_inference_steps: int
    token_ids: Tensor
    z: Tensor
    index: Tensor
    w_embedding: Tensor

    @classmethod
    def make(cls, parts: TextToImageParts, *, batch_size: int, num_inference_steps: int) -> SampleCalls:
        """Return the calls on a random batch, on the networks' device and in their precision."""
        device, dtype = parts.device, parts.unet.dtype
        tokens = parts.tokenizer.model_max_length
        return cls(
            text_encoder=parts.text_encoder,
            unet=parts.unet,
            vae=parts.vae,
            num_inference_steps=num_inference_steps,
            token_ids=torch.ones(batch_size, tokens, dtype=torch.int64, device=device),
            z=torch.randn(batch_size, *parts.latent_shape, device=device, dtype=dtype),
            index=torch.full((batch_size,), 999, dtype=torch.int64, device=device),
            w_embedding=torch.randn(batch_size, parts.unet.config.time_cond_proj_dim, device=device, dtype=dtype),
        )

    @torch.inference_mode()
    def run(self) -> None:
        """Make the calls once."""
        text = self.text_encoder(self.token_ids).last_hidden_state
        for _ in range(self.num_inference_steps):
            self.unet(self.z, self.index, text, timestep_cond=self.w_embedding, return_dict=False)
        self.vae.decode(self.z, return_dict=False)


def count_flops(call: Callable[[], Any]) -> int:
    """Return the floating-point operations of a call, a multiply-add as two, by torch's FLOP counter."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@dataclass(frozen=True)
class UpdateFlops:
    """What one picture costs in training: one forward pass of the network, and a whole update."""

    parameters: int
    forward: int
    update: int


def update_flops(
    stage: Stage,
    build: Callable[[torch.device], Denoiser],
    *,
    embedding_dim: int,
    sample_shape: tuple[int, int, int],
    conditions: Mapping[str, tuple[int, ...]],
) -> UpdateFlops:
    """Return the FLOPs of one picture, counted over `UpdateCalls` on meta tensors: no memory, no device, and the same
    number whatever kernels a device has. `parameters` are those of the trained network.

    Args:
        stage: whose update.
        build: returns the teacher on a device.
        embedding_dim: width of the student's w embedding.
        sample_shape, conditions: of a sample.
    """
    meta = torch.device("meta")
    model = build(meta)
    with meta:
        student: Any = unet_like(model.network, time_cond_proj_dim=embedding_dim)
        if stage == "progressive":
            model = model.with_network(student)
        calls = UpdateCalls.make(stage, model, student, batch_size=1, sample_shape=sample_shape, conditions=conditions)

        def forward() -> None:
            with torch.no_grad():
                calls.forward(student, calls.z, calls.time, calls.condition, calls.w_embedding)

        return UpdateFlops(
            parameters=sum(p.numel() for p in student.parameters()),
            forward=count_flops(forward),
            update=count_flops(lambda: calls.loss().backward()),
        )


def sample_flops(calls: SampleCalls) -> int:
    """Return the FLOPs of one picture by `SampleCalls`, counted on meta tensors."""
    with torch.device("meta"):
        parts = {
            "text_encoder": CLIPTextModel(calls.text_encoder.config),
            "unet": UNet2DConditionModel.from_config(calls.unet.config),
            "vae": AutoencoderKL.from_config(calls.vae.config),
        }
        counted = SampleCalls(
            **parts,
            num_inference_steps=calls.num_inference_steps,
            token_ids=torch.ones(1, calls.token_ids.shape[1], dtype=torch.int64),
            z=torch.randn(1, *calls.z.shape[1:]),
            index=torch.zeros(1, dtype=torch.int64),
            w_embedding=torch.randn(1, calls.w_embedding.shape[1]),
        )
        return count_flops(counted.run)
