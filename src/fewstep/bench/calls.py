"""The bare network calls of our own code in a plain loop, and what they cost in FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel

from fewstep.bench.device import Elapsed, Stopwatch
from fewstep.bench.settings import Precision, Stage
from fewstep.models import TextToImageParts


@dataclass(frozen=True)
class UpdateCalls:
    """The network calls of one update on a fixed batch: the teacher's forwards, the student's forward and backward.

    Stage one calls the teacher once with 2B rows (both branches), stage two twice with B rows.
    """

    stage: Stage
    teacher: nn.Module
    student: nn.Module
    z: Tensor
    index: Tensor
    text: Tensor
    w_embedding: Tensor

    @classmethod
    def make(
        cls,
        stage: Stage,
        teacher: UNet2DConditionModel,
        student: UNet2DConditionModel,
        *,
        batch_size: int,
        latent_shape: tuple[int, int, int],
        text_shape: tuple[int, int],
    ) -> UpdateCalls:
        """Return the calls on a random batch, on the networks' device."""
        device = student.device
        return cls(
            stage=stage,
            teacher=teacher,
            student=student,
            z=torch.randn(batch_size, *latent_shape, device=device),
            index=torch.randint(0, 1000, (batch_size,), device=device),
            text=torch.randn(batch_size, *text_shape, device=device),
            w_embedding=torch.randn(batch_size, student.config.time_cond_proj_dim, device=device),
        )

    def loss(self) -> Tensor:
        """Make the forward calls and return a scalar of the student's output."""
        z, index, text, w = self.z, self.index, self.text, self.w_embedding
        with torch.no_grad():
            if self.stage == "guidance":
                self.teacher(torch.cat([z, z]), torch.cat([index, index]), torch.cat([text, text]), return_dict=False)
            else:
                for _ in range(2):
                    self.teacher(z, index, text, timestep_cond=w, return_dict=False)
        return self.student(z, index, text, timestep_cond=w, return_dict=False)[0].float().square().mean()

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
    unet_config: dict[str, Any],
    *,
    embedding_dim: int,
    latent_shape: tuple[int, int, int],
    text_shape: tuple[int, int],
) -> UpdateFlops:
    """Return the FLOPs of one picture, counted over `UpdateCalls` on meta tensors: no memory, no device, and the same
    number whatever kernels a device has. `parameters` are those of the trained network."""
    with torch.device("meta"):
        student = UNet2DConditionModel.from_config({**unet_config, "time_cond_proj_dim": embedding_dim})
        teacher = student
        if stage == "guidance":
            teacher = UNet2DConditionModel.from_config({**unet_config, "time_cond_proj_dim": None})
        calls = UpdateCalls.make(
            stage, teacher, student, batch_size=1, latent_shape=latent_shape, text_shape=text_shape
        )

        def forward() -> None:
            with torch.no_grad():
                student(calls.z, calls.index, calls.text, timestep_cond=calls.w_embedding)

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
